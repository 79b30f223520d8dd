//! Copies what a directory has into a new tmpfs that will hide it (the mount option `tmpcopyup`).
//!
//! Links are copied and never followed, so that nothing outside the directory is read.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid, chownat, fchmod, fchown, mkdirat, openat,
    readlinkat, statat, symlinkat,
};

/// How deep directories may nest.
const DEPTH_MAX: usize = 64;

/// Copies files, directories and symbolic links with their owners and modes; other kinds are left out.
pub(crate) fn copy_contents(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    copy_directory(from, to, DEPTH_MAX)
}

fn copy_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other(format!(
            "directories nest deeper than {DEPTH_MAX}"
        )));
    }
    let source = open_directory(from, c".")?;
    for entry in Dir::read_from(&source)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let stat = statat(&source, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        let (uid, gid) = (
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
        );
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                let target = open_directory(to, name)?;
                copy_directory(
                    open_directory(source.as_fd(), name)?.as_fd(),
                    target.as_fd(),
                    depth - 1,
                )?;
                fchown(&target, uid, gid)?;
                fchmod(&target, mode)?;
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let mut original = File::from(openat(&source, name, flags, Mode::empty())?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut copy = File::from(openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
                io::copy(&mut original, &mut copy)?;
                fchown(&copy, uid, gid)?;
                fchmod(&copy, mode)?;
            }
            FileType::Symlink => {
                symlinkat(readlinkat(&source, name, Vec::new())?, to, name)?;
                chownat(to, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => {}
        }
    }
    Ok(())
}

fn open_directory(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(directory, name, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_copied_and_links_are_not_followed() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(from.path().join("a")).unwrap();
        std::fs::write(from.path().join("a/b"), "text").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", from.path().join("c")).unwrap();
        let open = |path| File::open(path).unwrap();
        copy_contents(open(from.path()).as_fd(), open(to.path()).as_fd()).unwrap();
        assert_eq!(
            std::fs::read_to_string(to.path().join("a/b")).unwrap(),
            "text"
        );
        let link = std::fs::read_link(to.path().join("c")).unwrap();
        assert_eq!(link.to_str(), Some("/etc/passwd"));
    }
}
