//! Filling in the files of `bench/peers`.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use minijinja::{Environment, UndefinedBehavior, Value, context};

use super::common::{Protocol, Services, frontend, n_workers};

/// The files, which are compiled in so that a built harness needs no checkout.
const FILES: [(&str, &str); 17] = [
    ("backend.conf", include_str!("../../peers/backend.conf")),
    ("dnsmasq.conf", include_str!("../../peers/dnsmasq.conf")),
    ("envoy-client.yaml", include_str!("../../peers/envoy-client.yaml")),
    ("envoy-endpoints.yaml", include_str!("../../peers/envoy-endpoints.yaml")),
    ("envoy-server.yaml", include_str!("../../peers/envoy-server.yaml")),
    ("envoy.yaml", include_str!("../../peers/envoy.yaml")),
    ("haproxy-http.cfg", include_str!("../../peers/haproxy-http.cfg")),
    ("haproxy-reload.cfg", include_str!("../../peers/haproxy-reload.cfg")),
    ("haproxy-runtime.cfg", include_str!("../../peers/haproxy-runtime.cfg")),
    ("haproxy-srv.cfg", include_str!("../../peers/haproxy-srv.cfg")),
    ("haproxy-tcp.cfg", include_str!("../../peers/haproxy-tcp.cfg")),
    ("ipvs.rules", include_str!("../../peers/ipvs.rules")),
    ("nftables-edge.nft", include_str!("../../peers/nftables-edge.nft")),
    ("nftables.nft", include_str!("../../peers/nftables.nft")),
    ("nginx-stream.conf", include_str!("../../peers/nginx-stream.conf")),
    ("nohop.toml", include_str!("../../peers/nohop.toml")),
    ("unbound.conf", include_str!("../../peers/unbound.conf")),
];

/// Fills in a file of `bench/peers` and writes it to `dir`, under the same name.
///
/// # Errors
/// When the file isn't a template, or `dir` can't be written to.
pub fn render(file: &str, services: &Services, dir: &Path) -> Result<PathBuf> {
    let text = rendered(file, services, dir)?;
    let path = dir.join(file);
    std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// The same file filled in, for a caller that writes it by itself.
///
/// # Errors
/// When the file isn't a template.
pub fn rendered(file: &str, services: &Services, dir: &Path) -> Result<String> {
    let found = FILES.iter().find(|(name, _)| *name == file);
    let (_, template) = found.with_context(|| format!("there is no bench/peers/{file}"))?;
    let is_udp = services.protocol == Protocol::Udp;
    let each = services.services.iter().enumerate().map(|(idx, service)| {
        let backends: Vec<Value> = service.backends.iter().map(|at| Address::value(*at)).collect();
        let address = Address::value(frontend(idx));
        context! { name => &service.name, address, backends, is_udp }
    });
    let all_backends: BTreeSet<SocketAddrV4> =
        services.services.iter().flat_map(|service| service.backends.iter().copied()).collect();
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_keep_trailing_newline(true);
    let values = context! {
        services => each.collect::<Vec<Value>>(),
        n_workers => n_workers(),
        backends => all_backends.into_iter().map(Address::value).collect::<Vec<Value>>(),
        is_http => services.protocol == Protocol::Http,
        dir => dir.display().to_string(),
        modules => "/usr/lib/nginx/modules",
        is_udp => services.protocol == Protocol::Udp,
        settings => services.settings.split('+').collect::<Vec<&str>>(),
        mode => if services.protocol == Protocol::Http { "http" } else { "tcp" },
    };
    let filled = environment.render_str(template, values);
    filled.with_context(|| format!("fill in bench/peers/{file}"))
}

/// Where a backend's sidecar listens in a mesh, beside the backend: ports that no suite uses.
pub fn mesh_port(backend: SocketAddrV4) -> u16 {
    backend.port().wrapping_add(20_000)
}

/// An address, which is written whole or by its parts `ip`, `port` and, in a mesh, `mesh_port`.
#[derive(Debug)]
struct Address(SocketAddrV4);

impl Address {
    fn value(address: SocketAddrV4) -> Value {
        Value::from_object(Address(address))
    }
}

impl minijinja::value::Object for Address {
    fn get_value(self: &std::sync::Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "ip" => Some(Value::from(self.0.ip().to_string())),
            "port" => Some(Value::from(self.0.port())),
            "mesh_port" => Some(Value::from(mesh_port(self.0))),
            _ => None,
        }
    }

    fn render(self: &std::sync::Arc<Self>, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::Service;

    #[test]
    fn all_files_can_be_filled_in() {
        let backends =
            vec![crate::node::Node::backend(0, 8080), crate::node::Node::backend(1, 8080)];
        let services =
            ["web", "db"].map(|name| Service { name: name.into(), backends: backends.clone() });
        for (protocol, settings) in [
            (Protocol::Tcp, ""),
            (Protocol::Udp, ""),
            (Protocol::Http, "eds+retry+outlier+LEAST_REQUEST+check+leastconn+no-redispatch"),
        ] {
            let settings = settings.to_owned();
            let services = Services { protocol, services: services.to_vec(), settings };
            for (file, _) in FILES {
                let text = rendered(file, &services, Path::new("/tmp/x")).expect(file);
                assert!(!text.contains("{{") && !text.contains("{%"), "{file}:\n{text}");
            }
        }
    }

    #[test]
    fn nftables_get_a_chain_a_service() {
        let services = Services::one(Protocol::Tcp, vec![crate::node::Node::backend(0, 8080)]);
        let text = rendered("nftables.nft", &services, Path::new("/tmp")).expect("filled in");
        assert!(text.contains("numgen random mod 1 map { 0 : 10.98.1.0 . 8080 }"), "{text}");
        assert!(text.contains("10.96.1.0 . tcp . 80 : goto web\n"), "{text}");
    }
}
