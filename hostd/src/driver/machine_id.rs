//! The machine id of clones: `/etc/machine-id` comes with the files of the original, and programs take
//! it for the one name of one machine (machine-id(5)).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::api::types::Instance;

const PATH: &str = "etc/machine-id";

/// What a clone is to have there: the same at each of its starts, and like no other instance's.
/// `None` for an instance that is no clone, and has whatever its image or itself put there.
pub(super) fn of_clone(instance: &Instance) -> Option<String> {
    instance.spec.from_snapshot.as_ref()?;
    let name = format!("{} {}", instance.name, instance.created_at);
    let digest = Sha256::digest(name.as_bytes());
    Some(
        digest
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    )
}

/// Replaces the machine id below `root`, if there is one. The instance has had its hands in there, so
/// no link is followed, and only a plain file is opened.
pub(super) fn replace(root: &Path, machine_id: &str) -> io::Result<()> {
    let root = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let found = rustix::fs::openat2(
        &root,
        PATH,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
    );
    let found = match found {
        Ok(found) => found,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
    if kind != FileType::RegularFile {
        return Ok(());
    }
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let mut first = [0];
    // An empty one is for the instance itself to fill.
    if File::open(&path)?.read(&mut first)? == 0 {
        return Ok(());
    }
    let mut file = File::options().write(true).truncate(true).open(&path)?;
    writeln!(file, "{machine_id}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    #[test]
    fn only_an_id_that_is_there_is_replaced_and_no_link_leads_out() {
        let dir = TempDir::new().unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "host").unwrap();
        for (text, after) in [
            (Some("old\n"), Some("new\n")),
            (Some(""), Some("")),
            (None, None),
        ] {
            let root = TempDir::new().unwrap();
            let file = root.path().join(PATH);
            if let Some(text) = text {
                fs::create_dir(root.path().join("etc")).unwrap();
                fs::write(&file, text).unwrap();
            }
            replace(root.path(), "new").unwrap();
            assert_eq!(fs::read_to_string(&file).ok().as_deref(), after);
        }
        for link in ["etc", PATH] {
            let root = TempDir::new().unwrap();
            let at = root.path().join(link);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            let target = if link == "etc" { dir.path() } else { &outside };
            fs::write(dir.path().join("machine-id"), "host").unwrap();
            symlink(target, at).unwrap();
            replace(root.path(), "new").unwrap();
        }
        assert_eq!(fs::read_to_string(&outside).unwrap(), "host");
        let other = fs::read_to_string(dir.path().join("machine-id")).unwrap();
        assert_eq!(other, "host");
    }
}
