//! An OCI image layout (opencontainers/image-spec 1.0) with the static binary, made without a daemon: one
//! layer, a configuration, a manifest and an index.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::release::{Architecture, Release, sha256, tar};
use crate::process;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// Where the archive lies.
pub fn path(architecture: Architecture, release: &Release) -> PathBuf {
    release.path(&format!("nohop-{}-{}-oci.tar", release.version, architecture.name()))
}

/// Writes the layout as one archive, such as `docker load` and `skopeo copy oci-archive:` take.
pub fn layout(
    architecture: Architecture,
    binary: &Path,
    licenses: &Path,
    release: &Release,
) -> Result<PathBuf> {
    let folder = release.work.join("image");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let (root, layout) = (folder.join("root"), folder.join("layout"));
    let blobs = layout.join("blobs/sha256");
    for made in [&root.join("usr/bin"), &root.join("usr/share/doc/nohop"), &blobs] {
        fs::create_dir_all(made).with_context(|| format!("can't make {}", made.display()))?;
    }
    fs::copy(binary, root.join("usr/bin/nohop"))?;
    fs::set_permissions(root.join("usr/bin/nohop"), fs::Permissions::from_mode(0o755))?;
    fs::copy(licenses, root.join("usr/share/doc/nohop/THIRD-PARTY-LICENSES.txt"))?;

    let layer = folder.join("layer.tar");
    tar(&root, &layer, &release.epoch)?;
    let diff_id = format!("sha256:{}", sha256(&layer)?);
    let layer = add(&blobs, &layer, LAYER)?;
    let created = created(&release.epoch)?;
    let config = json!({
        "architecture": architecture.debian(),
        "os": "linux",
        "created": created,
        "config": {
            "Entrypoint": ["/usr/bin/nohop"],
            "Cmd": ["run"],
            "Labels": {
                "org.opencontainers.image.title": "nohop",
                "org.opencontainers.image.description": "The load balancer without a proxy hop",
                "org.opencontainers.image.version": release.version,
                "org.opencontainers.image.revision": release.commit,
                "org.opencontainers.image.licenses": "MIT OR Apache-2.0",
            },
        },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
        "history": [{ "created": created, "created_by": "cargo xtask dist" }],
    });
    let config = add_json(&folder, &blobs, &config, CONFIG)?;
    // `docker load` reads this one, unless its images are containerd's.
    let blob = |it: &Value| {
        it["digest"].as_str().map(|digest| format!("blobs/{}", digest.replace(':', "/")))
    };
    let docker = json!([{
        "Config": blob(&config),
        "RepoTags": [format!("nohop:{}", release.version)],
        "Layers": [blob(&layer)],
    }]);
    fs::write(layout.join("manifest.json"), docker.to_string())?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
    });
    let mut manifest = add_json(&folder, &blobs, &manifest, MANIFEST)?;
    manifest["platform"] = json!({ "architecture": architecture.debian(), "os": "linux" });
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": release.version,
        "io.containerd.image.name": format!("nohop:{}", release.version),
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest] });
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(layout.join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    let to = path(architecture, release);
    tar(&layout, &to, &release.epoch)?;
    Ok(to)
}

/// The commit's time as the specification wants it.
fn created(epoch: &str) -> Result<String> {
    let mut date = std::process::Command::new("date");
    let printed = process::output(date.args(["-u", "-d", &format!("@{epoch}"), "+%FT%TZ"]))?;
    Ok(printed.trim().to_owned())
}

fn add_json(folder: &Path, blobs: &Path, value: &Value, kind: &str) -> Result<Value> {
    let file = folder.join("blob.json");
    fs::write(&file, value.to_string())?;
    add(blobs, &file, kind)
}

/// Moves a file to the blobs. Returns its descriptor.
fn add(blobs: &Path, file: &Path, kind: &str) -> Result<Value> {
    let digest = sha256(file)?;
    let size = fs::metadata(file)?.len();
    fs::rename(file, blobs.join(&digest))?;
    Ok(json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": size }))
}
