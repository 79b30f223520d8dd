//! Who a process is to be, looked up in the image's own /etc/passwd and /etc/group.
//!
//! The image is hostile: its files are opened so that no link leads out of its root, only regular
//! files are read, and no more of them than a bound.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::validate::FieldError;

/// More of /etc/passwd or /etc/group is not read.
const FILE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// The kernel's bound (NGROUPS_MAX).
const GROUPS_MAX: usize = 65536;

/// A user as the kernel knows one, and where it is at home.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Looks `user` up: `user`, `uid`, `user:group` or `uid:gid`; root if absent. Numbers need no entry.
///
/// # Errors
/// There is no such user or group.
pub(super) fn resolve(root: &Path, user: Option<&str>) -> Result<User, FieldError> {
    let read = |file: &str| {
        // An image without the file has no users by name.
        read_in_root(root, file).unwrap_or_default()
    };
    let (passwd, group) = (read("etc/passwd"), read("etc/group"));
    find(user.unwrap_or("0"), &passwd, &group)
}

fn find(wanted: &str, passwd: &str, group: &str) -> Result<User, FieldError> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group)) => (name, Some(group)),
        None => (wanted, None),
    };
    let entry = passwd
        .lines()
        .filter_map(parse_passwd)
        .find(|entry| entry.name == name || Some(entry.uid) == name.parse().ok());
    let uid = entry
        .as_ref()
        .map(|entry| entry.uid)
        .or_else(|| name.parse().ok())
        .ok_or_else(|| FieldError::new("/user", format!("the image has no user `{name}`")))?;
    let gid = match group_name {
        Some(wanted) => group
            .lines()
            .filter_map(parse_group)
            .find(|entry| entry.name == wanted)
            .map(|entry| entry.gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| {
                FieldError::new("/user", format!("the image has no group `{wanted}`"))
            })?,
        None => entry.as_ref().map_or(0, |entry| entry.gid),
    };
    // As other engines have it: who names a group gets that one alone.
    let groups = match (&entry, group_name) {
        (Some(entry), None) => group
            .lines()
            .filter_map(parse_group)
            .filter(|group| group.members.split(',').any(|member| member == entry.name))
            .map(|group| group.gid)
            .take(GROUPS_MAX)
            .collect(),
        _ => Vec::new(),
    };
    let home = entry
        .map(|entry| entry.home)
        .filter(|home| home.starts_with('/'));
    Ok(User {
        uid,
        gid,
        groups,
        home: home.unwrap_or("/").to_owned(),
    })
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn parse_passwd(line: &str) -> Option<PasswdEntry<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    Some(PasswdEntry {
        name: fields.first().filter(|name| !name.is_empty())?,
        uid: fields.get(2)?.parse().ok()?,
        gid: fields.get(3)?.parse().ok()?,
        home: fields.get(5)?,
    })
}

fn parse_group(line: &str) -> Option<GroupEntry<'_>> {
    let fields: Vec<&str> = line.split(':').collect();
    Some(GroupEntry {
        name: fields.first().filter(|name| !name.is_empty())?,
        gid: fields.get(2)?.parse().ok()?,
        members: fields.get(3)?.trim_end(),
    })
}

fn read_in_root(root: &Path, path: &str) -> io::Result<String> {
    let root = File::open(root)?;
    // NONBLOCK, since a pipe in its place would keep who opens it waiting.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(root.as_fd(), path, how)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use tempfile::TempDir;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\nbroken\n";
    const GROUP: &str = "root:x:0:\nstaff:x:50:other,app\nweb:x:33:app\n";

    #[test]
    fn users_and_groups_go_by_name_and_number() {
        for (wanted, uid, gid, groups, home) in [
            ("root", 0, 0, vec![], "/root"),
            ("app", 1000, 1001, vec![50, 33], "/home/app"),
            ("1000", 1000, 1001, vec![50, 33], "/home/app"),
            ("app:web", 1000, 33, vec![], "/home/app"),
            ("7:8", 7, 8, vec![], "/"),
            ("7", 7, 0, vec![], "/"),
        ] {
            let home = home.to_owned();
            let user = User {
                uid,
                gid,
                groups,
                home,
            };
            assert_eq!(find(wanted, PASSWD, GROUP).unwrap(), user, "{wanted}");
        }
        for wanted in ["nobody", "app:nothing", "-1", "4294967296"] {
            assert_eq!(
                find(wanted, PASSWD, GROUP).unwrap_err().field,
                "/user",
                "{wanted}"
            );
        }
    }

    #[test]
    fn no_link_leads_out_of_the_root() {
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(dir.path().join("secret"), "evil:x:0:0::/:\n").unwrap();
        for target in ["../../secret", dir.path().join("secret").to_str().unwrap()] {
            symlink(target, root.join("etc/passwd")).unwrap();
            resolve(&root, Some("evil")).unwrap_err();
            fs::remove_file(root.join("etc/passwd")).unwrap();
        }
        symlink("/etc/real", root.join("etc/passwd")).unwrap();
        fs::write(root.join("etc/real"), PASSWD).unwrap();
        assert_eq!(resolve(&root, Some("app")).unwrap().uid, 1000);
    }

    #[test]
    fn a_pipe_in_place_of_a_file_holds_nobody_up() {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        mkfifo(&dir.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert_eq!(resolve(dir.path(), None).unwrap().uid, 0);
    }
}
