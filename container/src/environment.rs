//! The environment of a container's program: what the configuration gives it, and HOME.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::OFlags;

use crate::plan::process::ProcessPlan;
use crate::root::Root;

/// The environment, each variable once, with HOME as the container's /etc/passwd has it where it is not
/// given, or empty.
pub(crate) fn environment(process: &ProcessPlan) -> Vec<CString> {
    let mut env = last_of_each(&process.env);
    if variable(&env, b"HOME").is_none_or(<[u8]>::is_empty) {
        env.retain(|entry| name_of(entry) != b"HOME");
        let home = home_of(process.user.uid).unwrap_or_else(|| "/".to_owned());
        env.extend(CString::new(format!("HOME={home}")));
    }
    env
}

/// Of variables that are given more than once the last, in the place of the last, as with runc: programs
/// do not agree about which one they take.
fn last_of_each(env: &[CString]) -> Vec<CString> {
    let mut seen = HashSet::new();
    let mut kept: Vec<CString> = env
        .iter()
        .rev()
        .filter(|entry| seen.insert(name_of(entry)))
        .cloned()
        .collect();
    kept.reverse();
    kept
}

fn name_of(entry: &CStr) -> &[u8] {
    let mut halves = entry.to_bytes().splitn(2, |byte| *byte == b'=');
    halves.next().unwrap_or_default()
}

/// The value of a variable; of several the last, as with the other runtimes.
pub(crate) fn variable<'a>(env: &'a [CString], name: &[u8]) -> Option<&'a [u8]> {
    env.iter().rev().find_map(|entry| {
        entry
            .to_bytes()
            .strip_prefix(name)
            .and_then(|rest| rest.strip_prefix(b"="))
    })
}

fn home_of(uid: u32) -> Option<String> {
    /// A longer file is read to here.
    const PASSWD_BYTES_MAX: u64 = 1024 * 1024;
    let text = read_file(Path::new("/etc/passwd"), PASSWD_BYTES_MAX).ok()?;
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.nth(2)?.parse() == Ok(uid);
        fields
            .nth(2)
            .filter(|home| found && !home.is_empty())
            .map(str::to_owned)
    })
}

/// Reads a file of an image, who may have put anything there: what would make this process wait, as a pipe
/// without a writer, is not opened to be read, and no link of the kernel is followed.
fn read_file(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let root = Root::current()?;
    let file = File::from(root.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut text = Vec::new();
    file.take(bytes_max).read_to_end(&mut text)?;
    Ok(text)
}
