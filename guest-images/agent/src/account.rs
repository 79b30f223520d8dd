//! Who a process runs as: looks up `user[:group]` in the image's /etc/passwd and /etc/group, by the
//! rules that Docker's images are written for.

/// What a user specification stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The groups that /etc/group lists the user in; none if the specification names a group.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum AccountError {
    #[error("The image's /etc/passwd has no user `{user}`")]
    NoUser { user: String },
    #[error("The image's /etc/group has no group `{group}`")]
    NoGroup { group: String },
}

struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Resolves `user`, `uid`, `user:group` or `uid:gid` in the texts of the two files.
///
/// A number needs no entry. A user without an entry has group 0 and home `/`.
pub(crate) fn resolve(
    specification: &str,
    passwd: &str,
    group: &str,
) -> Result<Account, AccountError> {
    let (user, wanted_group) = specification.split_once(':').unwrap_or((specification, ""));
    let user = if user.is_empty() { "0" } else { user };
    let number = number(user);
    let entry = users(passwd).find(|entry| match number {
        Some(uid) => entry.uid == uid,
        None => entry.name == user,
    });
    let mut account = match (&entry, number) {
        (Some(entry), _) => Account {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            home: entry.home.into(),
        },
        (None, Some(uid)) => Account {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: String::new(),
        },
        (None, None) => return Err(AccountError::NoUser { user: user.into() }),
    };
    if account.home.is_empty() {
        account.home = "/".into();
    }
    if !wanted_group.is_empty() {
        account.gid = group_id(wanted_group, group)?;
    } else if let Some(entry) = entry {
        let listed = groups(group).filter(|group| lists(group.members, entry.name));
        account.groups = listed.map(|group| group.gid).collect();
    }
    Ok(account)
}

fn group_id(wanted: &str, text: &str) -> Result<u32, AccountError> {
    if let Some(gid) = number(wanted) {
        return Ok(gid);
    }
    let found = groups(text).find(|group| group.name == wanted);
    found
        .map(|group| group.gid)
        .ok_or_else(|| AccountError::NoGroup {
            group: wanted.into(),
        })
}

/// A user or group id. The highest two stand for "none" and "nobody set it" in system calls.
fn number(text: &str) -> Option<u32> {
    text.parse()
        .ok()
        .filter(|id| *id <= i32::MAX.unsigned_abs())
}

fn lists(members: &str, user: &str) -> bool {
    members.split(',').any(|member| member == user)
}

/// The well-formed lines of /etc/passwd; others are passed over.
fn users(text: &str) -> impl Iterator<Item = User<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let (uid, gid) = (number(fields.next()?)?, number(fields.next()?)?);
        let (_comment, home) = (fields.next(), fields.next().unwrap_or_default());
        Some(User {
            name,
            uid,
            gid,
            home,
        })
    })
}

/// The well-formed lines of /etc/group.
fn groups(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let (name, _password) = (fields.next()?, fields.next()?);
        let gid = number(fields.next()?)?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # no entry\n\
        broken:x:one:1::/:\n\
        web:x:33:34:Web server:/srv/web:/bin/false\n\
        homeless:x:50:51\n\
        1000:x:7:7:A name that is a number:/seven:/bin/sh\n";
    const GROUP: &str = "root:x:0:\n\
        www:x:34:\n\
        log:x:4:syslog,web\n\
        video:x:44:web,root\n\
        webmasters:x:45:webmaster\n\
        broken:x\n";

    #[test]
    fn users_and_groups_are_found_as_docker_finds_them() {
        let table: &[(&str, u32, u32, &[u32], &str)] = &[
            ("", 0, 0, &[44], "/root"),
            ("root", 0, 0, &[44], "/root"),
            ("0", 0, 0, &[44], "/root"),
            ("web", 33, 34, &[4, 44], "/srv/web"),
            ("33", 33, 34, &[4, 44], "/srv/web"),
            ("web:", 33, 34, &[4, 44], "/srv/web"),
            ("web:log", 33, 4, &[], "/srv/web"),
            ("web:9999", 33, 9999, &[], "/srv/web"),
            (":log", 0, 4, &[], "/root"),
            ("homeless", 50, 51, &[], "/"),
            ("1000", 1000, 0, &[], "/"),
            ("1000:1000", 1000, 1000, &[], "/"),
        ];
        for (specification, uid, gid, groups, home) in table {
            let want = Account {
                uid: *uid,
                gid: *gid,
                groups: groups.to_vec(),
                home: (*home).into(),
            };
            let found = resolve(specification, PASSWD, GROUP);
            assert_eq!(found, Ok(want), "{specification}");
        }
    }

    #[test]
    fn unknown_names_and_impossible_numbers_are_refused() {
        for user in ["nobody", "-1", "4294967295", "broken", "web "] {
            let want = AccountError::NoUser { user: user.into() };
            assert_eq!(resolve(user, PASSWD, GROUP), Err(want));
        }
        for group in ["staff", "-1", "4294967296", "broken"] {
            let want = AccountError::NoGroup {
                group: group.into(),
            };
            assert_eq!(resolve(&format!("web:{group}"), PASSWD, GROUP), Err(want));
        }
    }

    #[test]
    fn an_image_without_the_files_has_numbers_only() {
        let account = resolve("65532:65532", "", "").unwrap();
        assert_eq!((account.uid, account.gid), (65532, 65532));
        assert_eq!(resolve("", "", "").unwrap().home, "/");
    }
}
