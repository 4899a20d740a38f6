//! The configuration that each resolver needs.

use std::net::SocketAddr;

use ipnet::IpNet;

use super::target::{DUMMY, ResolverKind, ZoneServer};

/// The drop-in of systemd-resolved.
pub(super) fn resolved_drop_in(target: &ZoneServer) -> String {
    let server = resolved_server(target.local);
    format!("{MARK}\n[Resolve]\nDNS={server}\nDomains=~{}\n", target.domain)
}

fn resolved_server(server: SocketAddr) -> String {
    // A port that isn't 53 needs systemd 246; without one, any version does.
    match server.port() {
        53 => server.ip().to_string(),
        _ => server.to_string(),
    }
}

/// The negative trust anchor of systemd-resolved: the zone isn't signed.
pub(super) fn negative_trust_anchor(target: &ZoneServer) -> String {
    format!("; {}\n{}\n", &MARK[2..], target.domain)
}

/// The first line of files that nohop writes.
pub(super) const MARK: &str =
    "# Written by `nohop dns setup`; `nohop dns setup --systemd-resolved --undo` takes it away.";

/// Where the drop-in goes, and the negative trust anchor, below the root.
pub(super) const DROP_IN: &str = "etc/systemd/resolved.conf.d/nohop.conf";
pub(super) const ANCHOR: &str = "etc/dnssec-trust-anchors.d/nohop.negative";

/// The instructions for a setup.
pub(super) fn text(kind: ResolverKind, target: &ZoneServer) -> String {
    match kind {
        ResolverKind::SystemdResolved => systemd_resolved(target),
        ResolverKind::ResolvConf => resolv_conf(target),
        ResolverKind::Dnsmasq => dnsmasq(target),
        ResolverKind::Docker => docker(target),
        ResolverKind::Nomad => nomad(target),
    }
}

fn systemd_resolved(target: &ZoneServer) -> String {
    let (drop_in, anchor) = (resolved_drop_in(target), negative_trust_anchor(target));
    let delegate =
        format!("[Delegate]\nDNS={}\nDomains={}\n", resolved_server(target.local), target.domain);
    let mut text = format!(
        "\
systemd-resolved sends names below {domain} to nohop alone. All others it sends to the servers of the
machine's links, as before, and to nohop too, which forwards them: the first answer applies. So nohop
needs upstreams: the links' servers, or dns.forward. (FallbackDNS= no longer applies.)
--apply writes both files and restarts it; --undo restores what was there.

No other file of systemd-resolved may have DNS=: it would ask those servers instead of nohop. Give
them to a link (systemd-networkd, NetworkManager), or to nohop as dns.forward. DNSOverTLS=yes can't
be, either.

/{DROP_IN}:
{drop_in}
/{ANCHOR}, for a resolver that validates (DNSSEC=yes or allow-downgrade):
{anchor}
then:
systemctl restart systemd-resolved

From systemd 258 on a delegation does it better, without the first file: no other name goes to nohop.
/etc/systemd/dns-delegate.d/nohop.dns-delegate:
{delegate}
Lookups of addresses (PTR) below 127.0.0.0/8 systemd-resolved answers itself, as localhost: ask nohop
for the names of VIPs, with nohop dns query.
",
        domain = target.domain,
        drop_in = indented(&drop_in),
        anchor = indented(&anchor),
        delegate = indented(&delegate),
    );
    if target.local.port() != 53 {
        text += "\nA port in DNS= needs systemd 246 or later: see systemctl --version.\n";
    }
    if target.local.to_string() == "127.0.0.53:53" {
        text += "\n127.0.0.53 is systemd-resolved's own address: set dns.listen to another, such \
                 as 127.0.0.1:53.\n";
    }
    text
}

fn resolv_conf(target: &ZoneServer) -> String {
    format!(
        "\
Every program asks nohop for every name, and nohop asks the machine's former resolver.

/etc/resolv.conf, as its only nameserver: musl asks all of them at once and takes the first answer,
and glibc tries the next only when one doesn't answer:
    nameserver {ip}

/etc/nohop/nohop.toml, with the addresses that were in /etc/resolv.conf before:
    [dns]
    forward = [\"ADDRESS:53\"]
{port}
The machine's names then depend on one daemon: let systemd hold its sockets (nohop.socket), or
leave the machine's resolver in place and give it the zone {domain} only (--systemd-resolved,
--dnsmasq). What writes /etc/resolv.conf (NetworkManager, dhclient, resolvconf) has to be configured, too.
",
        ip = target.local.ip(),
        domain = target.domain,
        port = port_53(target),
    )
}

fn dnsmasq(target: &ZoneServer) -> String {
    let ZoneServer { local, domain, pools, .. } = target;
    // dnsmasq has port 53 itself.
    let port = if local.port() == 53 { 5354 } else { local.port() };
    let ip = local.ip();
    let listen = SocketAddr::new(ip, port);
    let reverse: String =
        pools.iter().map(|pool| format!("\n    rev-server={pool},{ip}#{port}")).collect();
    let zones = pools.iter().map(reverse_zones).collect::<Vec<_>>().join(", ");
    let socket = socket_drop_in(&[listen]);
    format!(
        "\
dnsmasq sends names below {domain} to nohop and answers all others as before.

/etc/nohop/nohop.toml, because dnsmasq has port 53:
    [dns]
    listen = [\"{listen}\"]
{socket}
/etc/dnsmasq.d/nohop.conf:
    server=/{domain}/{ip}#{port}
    # VIPs are loopback addresses, which stop-dns-rebind would strip:
    rebind-domain-ok=/{domain}/
    # The names of VIPs:{reverse}
then:
    systemctl restart dnsmasq

Where dnsmasq validates (dnssec), nothing more is needed: a zone with a server of its own isn't
validated.

The same for unbound (unbound.conf):
    server:
        do-not-query-localhost: no
        domain-insecure: \"{domain}\"
        private-domain: \"{domain}\"
    forward-zone:
        name: \"{domain}\"
        forward-addr: {ip}@{port}
and, for the names of VIPs, a local-zone: \"ZONE\" transparent and a forward-zone for each ZONE of
{zones}.

and for BIND (named.conf):
    options {{ validate-except {{ \"{domain}\"; }}; }};
    zone \"{domain}\" {{ type forward; forward only; forwarders {{ {ip} port {port}; }}; }};
and, for the names of VIPs, the like for each zone of {zones}. It
has no effect below a zone that BIND serves itself, as Debian's does 127.in-addr.arpa.
"
    )
}

fn docker(target: &ZoneServer) -> String {
    format!(
        "\
A container has a loopback of its own, and Docker leaves loopback addresses out of the resolv.conf
that it makes: nohop needs an address that containers can reach. Where the host's /etc/resolv.conf
names that address (nohop dns setup --nomad), Docker copies it, and nothing more is needed.
{interface}
/etc/docker/daemon.json, and then: systemctl restart docker
    {{ \"dns\": [\"{ip}\"] }}

or for one container: docker run --dns {ip} ...
{port}",
        interface = interface(target),
        ip = remote_ip(target),
        port = port_53(target),
    )
}

fn nomad(target: &ZoneServer) -> String {
    format!(
        "\
One address of nohop's that the host and every container reach, as the nameserver of the host:
tasks of raw_exec and exec read the host's /etc/resolv.conf, also in groups with a network of their
own, and Docker copies nameservers that aren't loopback addresses. No job needs a `dns` block.
{interface}
/etc/resolv.conf, as its only nameserver; where it is a link of systemd-resolved's, a file in its place:
    nameserver {ip}

/etc/nohop/nohop.toml, with the addresses that were in /etc/resolv.conf before:
    [dns]
    forward = [\"ADDRESS:53\"]
{port}
All names then depend on one daemon: let systemd hold its sockets (nohop.socket). What writes
/etc/resolv.conf (NetworkManager, dhclient, resolvconf) has to be configured, too.

Where the host's /etc/resolv.conf has to stay as it is, each group names the address instead:
    group \"web\" {{
      network {{
        mode = \"bridge\"
        dns {{
          servers = [\"{ip}\"]
        }}
      }}
    }}
",
        interface = interface(target),
        ip = remote_ip(target),
        port = port_53(target),
    )
}

/// The instructions for an address that containers can reach.
fn interface(target: &ZoneServer) -> String {
    if let Some(remote) = target.remote {
        return format!("\nnohop listens on {remote} already.\n");
    }
    let local = target.local;
    let socket = socket_drop_in(&[local, SocketAddr::from((DUMMY, 53))]);
    let (why, kind, peer, until_boot) = match target.has_dummy {
        true => (
            "A link-local address on a dummy interface is there before any bridge is, and stays.",
            "dummy",
            "",
            format!(
                "ip link add nohop0 type dummy && ip addr add {DUMMY}/32 dev nohop0 && \\\n    \
                 ip link set nohop0 up"
            ),
        ),
        false => (
            "A link-local address on an interface of its own is there before any bridge is, and \
             stays.\nThis kernel has no driver of dummy interfaces; one end of a veth pair serves as \
             well.",
            "veth",
            "    [Peer]\n    Name=nohop1\n",
            format!(
                "ip link add nohop0 type veth peer name nohop1 && \\\n    ip addr add {DUMMY}/32 dev \
                 nohop0 && ip link set nohop0 up && ip link set nohop1 up"
            ),
        ),
    };
    format!(
        "
{why}

With systemd-networkd, /etc/systemd/network/10-nohop.netdev:
    [NetDev]
    Name=nohop0
    Kind={kind}
{peer}and /etc/systemd/network/10-nohop.network:
    [Match]
    Name=nohop0{peer_match}
    [Network]
    Address={DUMMY}/32
    LinkLocalAddressing=no
then: systemctl restart systemd-networkd

or until the next boot:
    {until_boot}

An address that the host has already, such as that of its network, does as well; its network then
reaches nohop, too, and dns.allow decides who is answered.

/etc/nohop/nohop.toml:
    [dns]
    listen = [\"{local}\", \"{DUMMY}:53\"]
{socket}",
        peer_match = if target.has_dummy { "" } else { " nohop1" },
    )
}

/// The instructions for a socket unit with the addresses of `dns.listen`.
fn socket_drop_in(listen: &[SocketAddr]) -> String {
    let lines: String = listen
        .iter()
        .map(|address| format!("    ListenDatagram={address}\n    ListenStream={address}\n"))
        .collect();
    format!(
        "
and where systemd holds the sockets, /etc/systemd/system/nohop.socket.d/listen.conf:
    [Socket]
    ListenDatagram=
{lines}then:
    systemctl daemon-reload && systemctl restart nohop.socket nohop.service
"
    )
}

/// The reverse zones of a network: one ends at a label.
fn reverse_zones(pool: &IpNet) -> String {
    let IpNet::V4(pool) = pool else { return format!("that of {pool}") };
    let n_octets = usize::from(pool.prefix_len().div_ceil(8).clamp(1, 3));
    let zone = |ip: std::net::Ipv4Addr| {
        let octets = ip.octets().into_iter().take(n_octets).rev();
        octets.map(|octet| format!("{octet}.")).collect::<String>() + "in-addr.arpa"
    };
    match (zone(pool.network()), zone(pool.broadcast())) {
        (first, last) if first == last => first,
        (first, last) => format!("{first} to {last}"),
    }
}

fn remote_ip(target: &ZoneServer) -> String {
    target.remote.map_or(DUMMY.to_string(), |remote| remote.ip().to_string())
}

/// The note of a setup whose syntax has no port.
fn port_53(target: &ZoneServer) -> String {
    let port = target.remote.unwrap_or(target.local).port();
    match port {
        53 => String::new(),
        _ if target.remote.is_none() && target.local.ip().is_loopback() => format!(
            "\nThere is no place for a port here: nohop has to listen on port 53 of that address \
             (dns.listen has port {port}).\n"
        ),
        _ => format!("\nThere is no place for a port here: change {port} to 53 in dns.listen.\n"),
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(local: &str, remote: Option<&str>, domain: &str) -> ZoneServer {
        ZoneServer {
            local: local.parse().unwrap(),
            remote: remote.map(|remote| remote.parse().unwrap()),
            domain: domain.to_owned(),
            pools: vec!["127.128.0.0/9".parse().unwrap()],
            has_dummy: true,
        }
    }

    #[test]
    fn each_setup_has_its_settings() {
        let plain = target("127.0.0.1:53", None, "service");
        let odd = target("127.0.0.1:5354", Some("10.0.0.1:53"), "lb.corp");
        let without_dummy = ZoneServer { has_dummy: false, ..plain.clone() };
        let rows = [
            (ResolverKind::SystemdResolved, &plain, "    DNS=127.0.0.1\n    Domains=~service\n"),
            (ResolverKind::SystemdResolved, &plain, "    service\n"),
            (ResolverKind::SystemdResolved, &odd, "    DNS=127.0.0.1:5354\n    Domains=~lb.corp\n"),
            (ResolverKind::SystemdResolved, &odd, "systemd 246"),
            (ResolverKind::ResolvConf, &plain, "    nameserver 127.0.0.1\n"),
            (ResolverKind::Dnsmasq, &plain, "    server=/service/127.0.0.1#5354\n"),
            (ResolverKind::Dnsmasq, &plain, "    rebind-domain-ok=/service/\n"),
            (ResolverKind::SystemdResolved, &plain, "    DNS=127.0.0.1\n    Domains=service\n"),
            (ResolverKind::Dnsmasq, &plain, "    rev-server=127.128.0.0/9,127.0.0.1#5354\n"),
            (ResolverKind::Dnsmasq, &plain, "128.127.in-addr.arpa to 255.127.in-addr.arpa"),
            (
                ResolverKind::Dnsmasq,
                &plain,
                "    ListenDatagram=\n    ListenDatagram=127.0.0.1:5354\n",
            ),
            (ResolverKind::Docker, &plain, "    ListenStream=169.254.53.53:53\n"),
            (ResolverKind::Dnsmasq, &odd, "    server=/lb.corp/127.0.0.1#5354\n"),
            (ResolverKind::Dnsmasq, &odd, "domain-insecure: \"lb.corp\""),
            (ResolverKind::Docker, &plain, "{ \"dns\": [\"169.254.53.53\"] }"),
            (ResolverKind::Docker, &plain, "Address=169.254.53.53/32"),
            (ResolverKind::Docker, &plain, "listen = [\"127.0.0.1:53\", \"169.254.53.53:53\"]"),
            (ResolverKind::Docker, &odd, "nohop listens on 10.0.0.1:53 already"),
            (ResolverKind::Nomad, &plain, "servers = [\"169.254.53.53\"]"),
            (ResolverKind::Nomad, &odd, "servers = [\"10.0.0.1\"]"),
            (ResolverKind::Nomad, &plain, "    nameserver 169.254.53.53\n"),
            (ResolverKind::Nomad, &odd, "    nameserver 10.0.0.1\n"),
            (ResolverKind::Nomad, &plain, "    ip link add nohop0 type dummy && "),
            (
                ResolverKind::Nomad,
                &without_dummy,
                "    ip link add nohop0 type veth peer name nohop1 && ",
            ),
            (
                ResolverKind::Nomad,
                &without_dummy,
                "    Kind=veth\n    [Peer]\n    Name=nohop1\nand ",
            ),
            (ResolverKind::Docker, &without_dummy, "no driver of dummy interfaces"),
        ];
        for (kind, target, expected) in rows {
            let text = text(kind, target);
            assert!(text.contains(expected), "{kind:?} has no {expected:?}:\n{text}");
        }
        assert!(!text(ResolverKind::SystemdResolved, &plain).contains("246"));
        assert!(!text(ResolverKind::Docker, &odd).contains("dummy"));
        assert!(!text(ResolverKind::Nomad, &without_dummy).contains("type dummy"));
        assert!(!text(ResolverKind::Nomad, &plain).contains("veth"));
    }
}
