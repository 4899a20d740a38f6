//! `[consul]`, and the CONSUL_* variables that every tool of HashiCorp's knows.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::address;
use super::parse::{Draft, Overrides};
use super::toml_value::{Read, Value};

/// How to reach the Consul agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsulConfig {
    /// Where the agent's HTTP interface is, and whether TLS is spoken there.
    pub address: ConsulAddress,
    /// How TLS is spoken; it counts for [`ConsulAddress::Https`] alone.
    pub tls: TlsConfig,
    /// The token, if any.
    pub token: Option<Token>,
    /// The user and password of a proxy before the agent, if any, from CONSUL_HTTP_AUTH.
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

/// How TLS is spoken with the agent. Files are PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// The certificates of the authorities that are believed; with `ca_path` the only ones, else
    /// the system's are.
    pub ca_file: Option<PathBuf>,
    /// A directory of such files.
    pub ca_path: Option<PathBuf>,
    /// The certificate that is shown to the agent, and those that lead from it to its authority.
    pub cert_file: Option<PathBuf>,
    /// The key of that certificate.
    pub key_file: Option<PathBuf>,
    /// The name that the agent's certificate has to bear, and that it is asked for (SNI); without
    /// it, the address's host.
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

/// A file's or a directory's path; an empty one means none.
pub(super) fn path(value: &Value) -> Read<Option<PathBuf>> {
    value.text(|path| Ok((!path.is_empty()).then(|| PathBuf::from(path))))
}

/// A name that a certificate can bear; an empty one means none.
pub(super) fn server_name(text: &str) -> Result<Option<String>, String> {
    match text {
        "" => Ok(None),
        name if rustls::pki_types::ServerName::try_from(name).is_ok() => Ok(Some(name.into())),
        _ => Err(format!("'{text}' is no host's name; write one such as server.dc1.consul")),
    }
}

/// A datacenter, a namespace or a partition; `what` says which.
pub(super) fn name(text: &str, what: &str) -> Result<String, String> {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
        Ok(text.into())
    } else {
        Err(format!("'{text}' is no {what} of Consul; write letters, digits, - and _"))
    }
}

/// A flag of the environment, in the words that Consul's own tools take (Go's `ParseBool`).
fn flag(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("'{text}' is neither; write true or false")),
    }
}

/// Takes what the environment says. What a flag beats isn't judged.
pub(super) fn read_environment(
    draft: &mut Draft,
    env: &dyn Fn(&str) -> Option<String>,
    overrides: &Overrides,
) {
    if let Some(text) = env("CONSUL_HTTP_ADDR").filter(|_| overrides.consul_addr.is_none()) {
        let address = address::consul(&text);
        if let Some(address) = draft.outside("consul.address", "CONSUL_HTTP_ADDR", address) {
            draft.config.consul.address = address;
        }
    }
    // As in Consul's own tools, it beats a scheme that says otherwise; but no flag does it beat.
    if let Some(text) = env("CONSUL_HTTP_SSL").filter(|_| overrides.consul_addr.is_none())
        && let Some(true) = draft.outside("consul.address", "CONSUL_HTTP_SSL", flag(&text))
        && let ConsulAddress::Http(authority) = &draft.config.consul.address
    {
        // Port 80 is what an address without a port has, and TLS another.
        let authority = match authority.strip_suffix(":80") {
            Some(host) => format!("{host}:443"),
            None => authority.clone(),
        };
        draft.config.consul.address = ConsulAddress::Https(authority);
    }
    if let Some(text) = env("CONSUL_HTTP_AUTH") {
        let auth = BasicAuth::new(&text);
        draft.config.consul.auth = draft.outside("consul.auth", "CONSUL_HTTP_AUTH", auth);
    }
    if let Some(token) = env("CONSUL_HTTP_TOKEN") {
        draft.config.consul.token = Some(Token::Literal(token));
    }
    // The file wins, as it does in Consul's own tools.
    if let Some(file) = env("CONSUL_HTTP_TOKEN_FILE") {
        draft.config.consul.token = Some(Token::File(file.into()));
    }
    type Target = fn(&mut TlsConfig) -> &mut Option<PathBuf>;
    let files: [(&str, &str, Target); 4] = [
        ("consul.ca_file", "CONSUL_CACERT", |tls| &mut tls.ca_file),
        ("consul.ca_path", "CONSUL_CAPATH", |tls| &mut tls.ca_path),
        ("consul.cert_file", "CONSUL_CLIENT_CERT", |tls| &mut tls.cert_file),
        ("consul.key_file", "CONSUL_CLIENT_KEY", |tls| &mut tls.key_file),
    ];
    for (key, variable, target) in files {
        if let Some(file) = env(variable) {
            *target(&mut draft.config.consul.tls) = draft.outside(key, variable, Ok(file.into()));
        }
    }
    if let Some(text) = env("CONSUL_TLS_SERVER_NAME") {
        let name = server_name(&text);
        if let Some(name) = draft.outside("consul.tls_server_name", "CONSUL_TLS_SERVER_NAME", name)
        {
            draft.config.consul.tls.server_name = name;
        }
    }
    if let Some(text) = env("CONSUL_HTTP_SSL_VERIFY")
        && let Some(verify) = draft.outside("consul.verify", "CONSUL_HTTP_SSL_VERIFY", flag(&text))
    {
        draft.config.consul.tls.verify = verify;
    }
    if let Some(text) = env("CONSUL_NAMESPACE") {
        let namespace = name(&text, "namespace");
        if let Some(name) = draft.outside("consul.namespace", "CONSUL_NAMESPACE", namespace) {
            draft.config.consul.namespace = name;
        }
    }
    if let Some(text) = env("CONSUL_PARTITION") {
        let partition = name(&text, "partition");
        if let Some(name) = draft.outside("consul.partition", "CONSUL_PARTITION", partition) {
            draft.config.consul.partition = name;
        }
    }
}

/// Notes what is wrong with the options of TLS: such as count for nothing, and files that aren't
/// what they should be. What is right now can be wrong later, so whoever uses the files looks again.
pub(super) fn check_tls(draft: &mut Draft) {
    let tls = draft.config.consul.tls.clone();
    let paths = [
        ("consul.ca_file", &tls.ca_file),
        ("consul.ca_path", &tls.ca_path),
        ("consul.cert_file", &tls.cert_file),
        ("consul.key_file", &tls.key_file),
    ];
    if !matches!(draft.config.consul.address, ConsulAddress::Https(_)) {
        let given = paths.iter().find(|(_, path)| path.is_some()).map(|(key, _)| *key);
        let given = given.or(tls.server_name.is_some().then_some("consul.tls_server_name"));
        if let Some(key) = given.or((!tls.verify).then_some("consul.verify")) {
            let what = format!(
                "counts for nothing, since {} is asked without TLS; write https://HOST:PORT as \
                 consul.address, or remove this",
                draft.config.consul.address
            );
            draft.contradiction(&[key, "consul.address"], what);
        }
        return;
    }
    match (&tls.cert_file, &tls.key_file) {
        (Some(_), None) => draft.contradiction(
            &["consul.cert_file", "consul.key_file"],
            "is a certificate without its key; add consul.key_file",
        ),
        (None, Some(_)) => draft.contradiction(
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
            draft.contradiction(&[key], format!("{} {what}", path.display()));
        }
    }
}

/// The certificates in a PEM file, at least one.
///
/// # Errors
/// What is wrong with the file, and the fix, to be read after its path.
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
/// What is wrong with the file, and the fix, to be read after its path.
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
    let file = std::fs::File::open(path).map_err(|error| unread(&error))?;
    file.take(MAX_PEM).read_to_end(&mut pem).map_err(|error| unread(&error))?;
    Ok(pem)
}

fn unread(error: &io::Error) -> String {
    format!("can't be read ({error}); name one that can")
}
