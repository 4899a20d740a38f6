//! A contender's colour, the same in all pictures of all suites.
//!
//! nohop has the one accent, what has no balancer in between is grey, and the others share the calm
//! hues of Paul Tol's *muted* scheme, which colour-blind readers can tell apart, toned down further so
//! that the accent stands out on white and on black. Text and markers repeat the colour's meaning.

/// A colour on white and one on black, and a shape beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Color {
    pub light: &'static str,
    pub dark: &'static str,
    /// A path around the origin.
    pub marker: &'static str,
}

const CIRCLE: &str = "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z";
const SQUARE: &str = "M-3.5 -3.5H3.5V3.5H-3.5Z";
const DIAMOND: &str = "M0 -5L5 0L0 5L-5 0Z";
const TRIANGLE: &str = "M0 -4.5L4.8 3.8H-4.8Z";
const WEDGE: &str = "M0 4.5L4.8 -3.8H-4.8Z";
const CROSS: &str = "M-1.6 -4.5H1.6V-1.6H4.5V1.6H1.6V4.5H-1.6V1.6H-4.5V-1.6H-1.6Z";

const ACCENT: Color = Color { light: "#e8590c", dark: "#ff7a2f", marker: CIRCLE };
const NEUTRAL: Color = Color { light: "#8a929c", dark: "#8b949e", marker: SQUARE };

const INDIGO: Color = Color { light: "#6c68bb", dark: "#8a86d6", marker: DIAMOND };
const CYAN: Color = Color { light: "#74b3d8", dark: "#74b0d0", marker: TRIANGLE };
const TEAL: Color = Color { light: "#4fa396", dark: "#4f9f93", marker: WEDGE };
const GREEN: Color = Color { light: "#5b9a69", dark: "#5c9a6a", marker: SQUARE };
const OLIVE: Color = Color { light: "#9c9c50", dark: "#9d9d55", marker: CROSS };
const SAND: Color = Color { light: "#c9b25c", dark: "#c2b06a", marker: DIAMOND };
const ROSE: Color = Color { light: "#cf8590", dark: "#c87f8a", marker: TRIANGLE };
const WINE: Color = Color { light: "#9c5a7b", dark: "#ab6b8c", marker: WEDGE };
const PURPLE: Color = Color { light: "#b47cac", dark: "#b07aa8", marker: CROSS };

/// By what a name begins with; the first that fits.
const NAMED: [(&str, Color); 23] = [
    ("nohop", ACCENT),
    ("direct", NEUTRAL),
    ("haproxy http", CYAN),
    ("haproxy", INDIGO),
    ("envoy mesh", WINE),
    ("envoy", PURPLE),
    ("nginx", GREEN),
    ("ipvs", TEAL),
    ("iptables", OLIVE),
    ("nftables", SAND),
    ("kube-proxy", ROSE),
    ("cilium", ROSE),
    ("dnsmasq", INDIGO),
    ("unbound", TEAL),
    ("coredns", CYAN),
    ("systemd-resolved", OLIVE),
    ("resolved", OLIVE),
    ("consul", ROSE),
    ("linkerd", TEAL),
    ("katran", WINE),
    ("pgbouncer", PURPLE),
    ("client", WINE),
    ("dns", GREEN),
];

const OTHERS: [Color; 9] = [WINE, TEAL, SAND, INDIGO, ROSE, OLIVE, CYAN, PURPLE, GREEN];

impl Color {
    /// Of a contender, by its name: one that isn't known here gets one that depends on its name only.
    pub fn of(name: &str) -> Color {
        let name = name.to_lowercase();
        match NAMED.iter().find(|(known, _)| name.starts_with(known)) {
            // A variant of nohop is not nohop: there is one accent in a picture.
            Some((known, hue)) if *known != "nohop" || name == *known => *hue,
            _ => {
                let sum = name.bytes().fold(7_usize, |sum, byte| {
                    sum.wrapping_mul(31).wrapping_add(usize::from(byte))
                });
                OTHERS[sum % OTHERS.len()]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hues_by_name() {
        for (name, hue) in [
            ("nohop", ACCENT),
            ("direct", NEUTRAL),
            ("HAProxy tcp", INDIGO),
            ("HAProxy http", CYAN),
            ("Envoy tcp", PURPLE),
        ] {
            assert_eq!(Color::of(name), hue, "{name}");
        }
        assert_ne!(Color::of("nohop, IPv6"), ACCENT);
        assert_eq!(Color::of("whatever"), Color::of("Whatever"));
    }
}
