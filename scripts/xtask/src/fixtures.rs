//! OCI images made on this machine from Debian packages, for the tests and the demo.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::paths;
use crate::step::{command, run, step};

/// Bumped when the recipe below changes.
const VERSION: &str = "1";

/// An OCI layout with one image, `latest`: Debian's static busybox with all its applets.
pub(crate) fn busybox() -> Result<PathBuf> {
    let dir = paths::build()
        .join("images")
        .join(format!("busybox-{VERSION}"));
    if dir.join("oci-layout").exists() {
        return Ok(dir);
    }
    step("Make an OCI image of busybox", || {
        let work = tempfile::tempdir_in(make_parent(&dir)?)?;
        let root = work.path().join("root");
        busybox_root(&root)?;
        let layer = work.path().join("layer.tar");
        let arguments = [
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "-cf",
        ];
        run(command("tar", arguments)
            .arg(&layer)
            .arg("-C")
            .arg(&root)
            .arg("."))?;
        let layout = work.path().join("layout");
        let image = format!("{}:latest", layout.display());
        run(command("umoci", ["init", "--layout"]).arg(&layout))?;
        run(&mut command("umoci", ["new", "--image", &image]))?;
        run(command("umoci", ["raw", "add-layer", "--image", &image]).arg(&layer))?;
        let config = ["config", "--image", &image, "--config.cmd", "/bin/sh"];
        let path = "--config.env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        run(command("umoci", config).arg(path))?;
        fs::rename(&layout, &dir).context("Cannot move the image in place")
    })?;
    Ok(dir)
}

fn make_parent(dir: &Path) -> Result<&Path> {
    let parent = dir.parent().context("The image's directory has a parent")?;
    fs::create_dir_all(parent)?;
    Ok(parent)
}

fn busybox_root(root: &Path) -> Result<()> {
    for dir in [
        "bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr/bin", "var",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))
        .context("busybox-static is not installed")?;
    for applet in run(&mut command("/bin/busybox", ["--list"]))?.lines() {
        if applet != "busybox" {
            symlink("busybox", root.join("bin").join(applet))?;
        }
    }
    let users = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
    fs::write(root.join("etc/passwd"), users)?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    run(command("chmod", ["1777"]).arg(root.join("tmp"))).map(|_| ())
}
