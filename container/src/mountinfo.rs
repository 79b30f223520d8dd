//! The kernel's tables of mounts (proc_pid_mountinfo(5)).

use std::path::PathBuf;

/// What a line of such a table says, as far as somebody wants to know.
#[derive(Debug)]
pub(crate) struct Line<'a> {
    /// The device's number, which names the file system.
    pub(crate) device: &'a str,
    /// As the kernel writes it; see [`Line::point`].
    point: &'a str,
    /// The type of the file system.
    pub(crate) kind: &'a str,
    /// Of the file system, separated by commas.
    pub(crate) options: &'a str,
}

impl<'a> Line<'a> {
    pub(crate) fn parse(line: &'a str) -> Option<Self> {
        let (mount, source) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let mut source = source.split(' ');
        Some(Self {
            device: mount.next()?,
            point: mount.nth(1)?,
            kind: source.next()?,
            options: source.nth(1)?,
        })
    }

    /// Where it is mounted.
    pub(crate) fn point(&self) -> PathBuf {
        PathBuf::from(unescape(self.point))
    }
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &str) -> String {
    let mut text = field.to_owned();
    // The backslash is last: what it gives must not be read again.
    for (escape, plain) in [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ] {
        text = text.replace(escape, plain);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_what_it_was_before_the_kernel_escaped_it() {
        assert_eq!(unescape("/srv/a\\040root\\134040"), "/srv/a root\\040");
    }
}
