//! `[consul]`, and the CONSUL_* variables that every tool of HashiCorp's knows.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::{Serialize, Serializer};

use super::address::check_url_host;
use super::builder::{ConfigBuilder, FlagValue};
use crate::regular_file;

/// How to reach the Consul agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConsulConfig {
    /// Where the agent's HTTP interface is, and whether TLS is spoken there.
    pub address: ConsulAddress,
    /// The options of TLS, for [`ConsulAddress::Https`] alone.
    #[serde(flatten)]
    pub tls: TlsConfig,
    /// The token, if any.
    #[serde(rename = "token_file")]
    pub token: Option<Token>,
    /// The user and password of a proxy before the agent, if any, from CONSUL_HTTP_AUTH.
    #[serde(skip)]
    pub auth: Option<BasicAuth>,
    /// The datacenter; empty means the agent's own.
    pub datacenter: String,
    /// The namespace (Consul Enterprise); empty means the token's, or `default`.
    pub namespace: String,
    /// The admin partition (Consul Enterprise); empty means the agent's own.
    pub partition: String,
    /// The most connections to the agent at any time; at least 4: one for the list of names, one for
    /// the switch `nohop/off`, one for what can't wait, and one for the services that are live.
    pub max_connections: usize,
}

impl Default for ConsulConfig {
    fn default() -> Self {
        ConsulConfig {
            address: ConsulAddress::Http("127.0.0.1:8500".into()),
            tls: TlsConfig::default(),
            token: None,
            auth: None,
            datacenter: String::new(),
            namespace: String::new(),
            partition: String::new(),
            max_connections: 64,
        }
    }
}

/// Where the agent's HTTP interface is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsulAddress {
    /// `host:port`, without TLS.
    Http(String),
    /// `host:port`, with TLS.
    Https(String),
    /// A unix socket, without TLS.
    Unix(PathBuf),
}

impl fmt::Display for ConsulAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConsulAddress::Http(authority) => f.write_str(authority),
            ConsulAddress::Https(authority) => write!(f, "https://{authority}"),
            ConsulAddress::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl Serialize for ConsulAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            ConsulAddress::Http(authority) => format!("http://{authority}").serialize(serializer),
            _ => serializer.collect_str(self),
        }
    }
}

/// How TLS is spoken with the agent. Files are PEM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TlsConfig {
    /// The certificates of the trusted authorities; with `ca_path` the only ones, without both the
    /// system's.
    pub ca_file: Option<PathBuf>,
    /// A directory of such files.
    pub ca_path: Option<PathBuf>,
    /// The certificate that is shown to the agent, and those that lead from it to its authority.
    pub cert_file: Option<PathBuf>,
    /// The key of that certificate.
    pub key_file: Option<PathBuf>,
    /// The expected name in the agent's certificate, also sent as SNI; without it, the address's host.
    #[serde(rename = "tls_server_name")]
    pub server_name: Option<String>,
    /// Whether the agent's certificate has to be good.
    pub verify: bool,
}

impl Default for TlsConfig {
    fn default() -> Self {
        TlsConfig {
            ca_file: None,
            ca_path: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            verify: true,
        }
    }
}

/// Where the ACL token comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// The token itself, from CONSUL_HTTP_TOKEN.
    Literal(String),
    /// The file that holds it.
    File(PathBuf),
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Literal(_) => f.write_str("Literal(..)"),
            Token::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// The token itself is never shown.
impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Token::Literal(_) => serializer.serialize_str("(a token)"),
            Token::File(path) => path.serialize(serializer),
        }
    }
}

/// A user and a password (RFC 7617), as `user:password`.
#[derive(Clone, PartialEq, Eq)]
pub struct BasicAuth(String);

impl BasicAuth {
    /// Of `user:password`; the password may be empty, and then the colon may be missing.
    ///
    /// # Errors
    /// That there is no user, or that a header can't hold it.
    pub fn new(text: &str) -> Result<BasicAuth, String> {
        let (user, password) = text.split_once(':').unwrap_or((text, ""));
        let is_good = !user.is_empty() && !text.chars().any(char::is_control);
        // The text is a secret, so it isn't shown.
        is_good
            .then(|| BasicAuth(format!("{user}:{password}")))
            .ok_or_else(|| "has no user, or control characters; write USER:PASSWORD".into())
    }

    /// The value of the header `Authorization`.
    pub fn header(&self) -> String {
        format!("Basic {}", data_encoding::BASE64.encode(self.0.as_bytes()))
    }
}

impl fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BasicAuth(..)")
    }
}

/// A name that a certificate can bear; an empty one means none.
pub(super) fn server_name(text: &str) -> Result<Option<String>, String> {
    let is_good = match ServerName::try_from(text) {
        // It takes the place of the host in the URL.
        Ok(ServerName::DnsName(_)) => check_url_host(text).is_ok(),
        name => name.is_ok(),
    };
    match text {
        "" => Ok(None),
        name if is_good => Ok(Some(name.into())),
        _ => Err(format!("'{text}' isn't a host name; write one such as server.dc1.consul")),
    }
}

/// A datacenter, a namespace or a partition, named by `what`.
pub(super) fn name(text: &str, what: &str) -> Result<String, String> {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
        Ok(text.into())
    } else {
        Err(format!("'{text}' isn't a {what} of Consul; write letters, digits, - and _"))
    }
}

/// A flag of the environment, with the values of Consul's own tools (Go's `ParseBool`).
fn flag(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("'{text}' isn't a boolean; write true or false")),
    }
}

/// The variables that set a key; the token's file comes after the token, which it overrides.
pub const VARIABLES: [(&str, &str); 9] = [
    ("CONSUL_HTTP_ADDR", "consul.address"),
    ("CONSUL_HTTP_TOKEN_FILE", "consul.token_file"),
    ("CONSUL_CACERT", "consul.ca_file"),
    ("CONSUL_CAPATH", "consul.ca_path"),
    ("CONSUL_CLIENT_CERT", "consul.cert_file"),
    ("CONSUL_CLIENT_KEY", "consul.key_file"),
    ("CONSUL_TLS_SERVER_NAME", "consul.tls_server_name"),
    ("CONSUL_NAMESPACE", "consul.namespace"),
    ("CONSUL_PARTITION", "consul.partition"),
];

/// Those of the keys whose values are paths.
const FILES: [&str; 5] = [
    "consul.token_file",
    "consul.ca_file",
    "consul.ca_path",
    "consul.cert_file",
    "consul.key_file",
];

/// Applies the variables of the environment. What a flag sets isn't checked.
pub(super) fn read_environment(
    builder: &mut ConfigBuilder,
    env: &dyn Fn(&str) -> Option<String>,
    is_set: &dyn Fn(&str) -> bool,
) {
    let env = |name: &str| env(name).filter(|value| !value.is_empty());
    if let Some(token) = env("CONSUL_HTTP_TOKEN") {
        builder.config.consul.token = Some(Token::Literal(token));
        builder.outside("consul.token_file", "CONSUL_HTTP_TOKEN", None);
    }
    for (variable, key) in VARIABLES {
        if let Some(text) = env(variable).filter(|_| !is_set(key)) {
            let value = match FILES.contains(&key) {
                true => FlagValue::path(&text),
                false => FlagValue::Text(text),
            };
            builder.apply(key, variable, &value);
        }
    }
    // It overrides a scheme that disagrees, as in Consul's own tools, but no flag.
    if let Some(text) = env("CONSUL_HTTP_SSL").filter(|_| !is_set("consul.address")) {
        let address = &mut builder.config.consul.address;
        match (flag(&text), &*address) {
            (Err(what), _) => builder.outside("consul.address", "CONSUL_HTTP_SSL", [what]),
            (Ok(true), ConsulAddress::Http(authority)) => {
                // Port 80 is the default of an address without a port; with TLS it is 443.
                let authority = match authority.strip_suffix(":80") {
                    Some(host) => format!("{host}:443"),
                    None => authority.clone(),
                };
                *address = ConsulAddress::Https(authority);
                builder.outside("consul.address", "CONSUL_HTTP_SSL", None);
            }
            (Ok(_), _) => {}
        }
    }
    if let Some(text) = env("CONSUL_HTTP_SSL_VERIFY") {
        match flag(&text) {
            Ok(is_on) => {
                let value = FlagValue::Bool(is_on);
                builder.apply("consul.verify", "CONSUL_HTTP_SSL_VERIFY", &value);
            }
            Err(what) => builder.outside("consul.verify", "CONSUL_HTTP_SSL_VERIFY", [what]),
        }
    }
    if let Some(text) = env("CONSUL_HTTP_AUTH") {
        let auth = BasicAuth::new(&text);
        builder.outside("consul.auth", "CONSUL_HTTP_AUTH", auth.as_ref().err().cloned());
        builder.config.consul.auth = auth.ok();
    }
}

/// Adds the problems of the TLS options: options without effect, and invalid files. The files may change
/// later, so their users check them again.
pub(super) fn check_tls(builder: &mut ConfigBuilder) {
    let tls = builder.config.consul.tls.clone();
    let paths = [
        ("consul.ca_file", &tls.ca_file),
        ("consul.ca_path", &tls.ca_path),
        ("consul.cert_file", &tls.cert_file),
        ("consul.key_file", &tls.key_file),
    ];
    if !matches!(builder.config.consul.address, ConsulAddress::Https(_)) {
        let given = paths.iter().find(|(_, path)| path.is_some()).map(|(key, _)| *key);
        let given = given.or(tls.server_name.is_some().then_some("consul.tls_server_name"));
        if let Some(key) = given.or((!tls.verify).then_some("consul.verify")) {
            let what = format!(
                "has no effect, because {} is used without TLS; write https://HOST:PORT as \
                 consul.address, or remove this",
                builder.config.consul.address
            );
            builder.conflict(&[key, "consul.address"], what);
        }
        return;
    }
    match (&tls.cert_file, &tls.key_file) {
        (Some(_), None) => builder.conflict(
            &["consul.cert_file", "consul.key_file"],
            "is a certificate without its key; add consul.key_file",
        ),
        (None, Some(_)) => builder.conflict(
            &["consul.key_file", "consul.cert_file"],
            "is a key without its certificate; add consul.cert_file",
        ),
        _ => {}
    }
    for (key, path) in paths {
        let Some(path) = path else { continue };
        let read = match key {
            "consul.ca_path" => std::fs::read_dir(path).map(drop).map_err(|error| unread(&error)),
            "consul.key_file" => read_key(path).map(drop),
            _ => read_certificates(path).map(drop),
        };
        if let Err(what) = read {
            builder.conflict(&[key], format!("{} {what}", path.display()));
        }
    }
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// The file's problem and the fix, to follow its path.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read(path)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err("holds no certificate in PEM; write one that begins with -----BEGIN \
                  CERTIFICATE-----"
            .into()),
    }
}

/// The private key in a PEM file.
///
/// # Errors
/// The file's problem and the fix, to follow its path.
pub fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|_| {
        "holds no private key in PEM; write one without a passphrase that begins with -----BEGIN \
         PRIVATE KEY-----"
            .into()
    })
}

/// The largest PEM file that is read: several times all authorities of a system together.
const MAX_PEM: u64 = 4 << 20;

fn read(path: &Path) -> Result<Vec<u8>, String> {
    use io::Read;
    let mut pem = Vec::new();
    let file = regular_file::open(path).map_err(|error| unread(&error))?;
    file.take(MAX_PEM).read_to_end(&mut pem).map_err(|error| unread(&error))?;
    Ok(pem)
}

fn unread(error: &io::Error) -> String {
    format!("can't be read ({error}); name one that can")
}
