//! The host keys of an OpenSSH server. Of two machines that have the same ones either can be taken for
//! the other, so a clone gets new ones.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::console::say;

/// Where the server keeps them.
pub(super) const DIRECTORY: &str = "/etc/ssh";
/// Where images have the program that makes them.
const GENERATORS: [&str; 2] = ["/usr/bin/ssh-keygen", "/usr/local/bin/ssh-keygen"];
/// The types that every version makes. A key of another type stays as it is.
const TYPES: [&str; 3] = ["rsa", "ecdsa", "ed25519"];
/// The server's program. Since version 9.8 its sessions have another one.
const SERVER: &str = "sshd";

/// Why there are no new keys.
#[derive(Debug, thiserror::Error)]
pub enum HostKeyError {
    #[error("Failed to execute {generator}")]
    Execute {
        generator: PathBuf,
        source: io::Error,
    },
    #[error("{generator} made no key of the type {kind}")]
    NotMade {
        generator: PathBuf,
        kind: &'static str,
    },
    #[error("Failed to put a new key at {path}")]
    Replace { path: PathBuf, source: io::Error },
}

/// The program of the image that makes keys.
pub(super) fn generator() -> Option<PathBuf> {
    GENERATORS
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
}

/// Replaces each key in `directory` by a new one of its type. `execute` runs a program to its end, and
/// tells whether it succeeded. Can be repeated if it was cut off.
pub(super) fn renew(
    directory: &Path,
    generator: Option<PathBuf>,
    mut execute: impl FnMut(&mut Command) -> io::Result<bool>,
) -> Result<(), HostKeyError> {
    let path = |kind: &str| directory.join(format!("ssh_host_{kind}_key"));
    let kinds: Vec<&str> = TYPES
        .into_iter()
        .filter(|kind| path(kind).exists())
        .collect();
    if kinds.is_empty() {
        return Ok(());
    }
    let Some(generator) = generator else {
        say("The ssh host keys are those of the original: the image has no ssh-keygen");
        return Ok(());
    };
    for kind in kinds {
        let fresh = directory.join(".ssh_host_key.new");
        // It asks before it overwrites.
        let _ = fs::remove_file(&fresh);
        let mut command = Command::new(&generator);
        command
            .args(["-q", "-t", kind, "-N", "", "-f"])
            .arg(&fresh)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let made = execute(&mut command).map_err(|source| HostKeyError::Execute {
            generator: generator.clone(),
            source,
        })?;
        if !made {
            return Err(HostKeyError::NotMade { generator, kind });
        }
        // The private key last: whoever finds that one finds its public half.
        for (from, to) in [(public(&fresh), public(&path(kind))), (fresh, path(kind))] {
            fs::rename(from, &to).map_err(|source| HostKeyError::Replace { path: to, source })?;
        }
    }
    Ok(())
}

fn public(private: &Path) -> PathBuf {
    private.with_added_extension("pub")
}

/// The processes that wait for connections, and read the keys again when they get a SIGHUP. A session is
/// the child of one.
pub(super) fn servers() -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| is_server(*pid) && !parent(*pid).is_some_and(is_server))
        .collect()
}

fn is_server(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe"))
        .is_ok_and(|program| program.file_name().is_some_and(|name| name == SERVER))
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the program comes before it, in parentheses, and may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn key_type(key: &Path) -> String {
        let output = Command::new("ssh-keygen").arg("-lf").arg(key).output();
        let output = String::from_utf8(output.unwrap().stdout).unwrap();
        output.split_whitespace().last().unwrap().to_owned()
    }

    #[test]
    fn each_key_is_replaced_by_one_of_its_type() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let execute = |command: &mut Command| command.status().map(|status| status.success());
        for kind in ["ecdsa", "ed25519"] {
            let key = path(&format!("ssh_host_{kind}_key"));
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", kind, "-N", "", "-f"]).arg(key);
            assert!(execute(&mut command).unwrap());
        }
        fs::write(path("ssh_host_other_key"), "other").unwrap();
        // As a renewal leaves it that was cut off.
        fs::write(path(".ssh_host_key.new"), "half").unwrap();
        let read = |name: &str| fs::read_to_string(path(name)).unwrap();
        let before = [
            read("ssh_host_ecdsa_key"),
            read("ssh_host_ed25519_key"),
            read("ssh_host_ed25519_key.pub"),
        ];

        renew(directory.path(), generator(), execute).unwrap();
        for (name, old) in [
            ("ssh_host_ecdsa_key", &before[0]),
            ("ssh_host_ed25519_key", &before[1]),
            ("ssh_host_ed25519_key.pub", &before[2]),
        ] {
            assert_ne!(read(name), *old, "{name}");
        }
        assert_eq!(key_type(&path("ssh_host_ecdsa_key")), "(ECDSA)");
        let key = path("ssh_host_ed25519_key");
        assert_eq!(key_type(&key), "(ED25519)");
        let derived = Command::new("ssh-keygen").arg("-yf").arg(&key).output();
        let derived = String::from_utf8(derived.unwrap().stdout).unwrap();
        assert_eq!(derived, read("ssh_host_ed25519_key.pub"));
        assert_eq!(
            fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(read("ssh_host_other_key"), "other");
        assert!(!path("ssh_host_rsa_key").exists() && !path(".ssh_host_key.new").exists());
    }

    #[test]
    fn without_keys_or_a_way_to_make_them_nothing_changes() {
        let directory = tempfile::tempdir().unwrap();
        let never = |_: &mut Command| panic!("nothing is to be executed");
        renew(directory.path(), Some("/usr/bin/ssh-keygen".into()), never).unwrap();
        let key = directory.path().join("ssh_host_rsa_key");
        fs::write(&key, "old").unwrap();
        renew(directory.path(), None, never).unwrap();
        assert_eq!(fs::read_to_string(&key).unwrap(), "old");

        let fails = |_: &mut Command| Ok(false);
        let error = renew(directory.path(), Some("/keygen".into()), fails).unwrap_err();
        assert_eq!(error.to_string(), "/keygen made no key of the type rsa");
        assert_eq!(fs::read_to_string(&key).unwrap(), "old");
    }

    #[test]
    fn a_server_is_found_by_its_program_and_its_session_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join(SERVER);
        // The first shell is the server; the second, its child, a session of the same program.
        // Copied by another process: a child of a test beside this one could hold it open for writing.
        let mut copy = Command::new("cp");
        copy.args(["--dereference", "/bin/sh"]).arg(&program);
        assert!(copy.status().unwrap().success());
        let mut server = Command::new(&program)
            .arg("-c")
            .arg("\"$0\" -c 'echo $$; read line'; :")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(server.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let session: i32 = line.trim().parse().unwrap();
        let found = servers();
        let pid = i32::try_from(server.id()).unwrap();
        drop(server.stdin.take());
        server.wait().unwrap();
        assert!(found.contains(&pid), "{found:?}");
        assert!(!found.contains(&session), "{found:?}");
    }
}
