//! The page for browsers: files that are part of the binary, and know nothing but `/v1`.

/// A file of the page.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Asset {
    /// Its path on the server.
    path: &'static str,
    pub(super) media_type: &'static str,
    pub(super) body: &'static [u8],
}

/// The path of the page itself.
pub(super) const PATH: &str = "/";

/// Every file. Those of `vendor` are unchanged copies of releases: `vendor/README.md` has their sources.
static ASSETS: [Asset; 10] = [
    Asset { path: PATH, media_type: HTML, body: include_bytes!("page/index.html") },
    Asset { path: "/page.css", media_type: CSS, body: include_bytes!("page/page.css") },
    Asset { path: "/icon.svg", media_type: SVG, body: include_bytes!("page/icon.svg") },
    script("/page.mjs", include_bytes!("page/page.mjs")),
    script("/store.mjs", include_bytes!("page/store.mjs")),
    script("/format.mjs", include_bytes!("page/format.mjs")),
    script("/services.mjs", include_bytes!("page/services.mjs")),
    script("/views.mjs", include_bytes!("page/views.mjs")),
    script("/vendor/preact/preact.mjs", include_bytes!("page/vendor/preact/preact.mjs")),
    script("/vendor/htm/htm.mjs", include_bytes!("page/vendor/htm/htm.mjs")),
];

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SVG: &str = "image/svg+xml";

const fn script(path: &'static str, body: &'static [u8]) -> Asset {
    Asset { path, media_type: "text/javascript; charset=utf-8", body }
}

/// The file at a path.
pub(super) fn find(path: &str) -> Option<&'static Asset> {
    ASSETS.iter().find(|asset| asset.path == path)
}
