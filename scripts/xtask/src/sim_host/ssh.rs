//! The way into the simulated host.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::step::{command, run};

/// A machine's ssh: its key and its port on loopback.
#[derive(Debug)]
pub(super) struct Ssh<'a> {
    pub(super) dir: &'a Path,
    pub(super) port: u16,
}

impl Ssh<'_> {
    /// Makes the key pair `key` and `key.pub` in `dir`.
    pub(super) fn make_key(dir: &Path) -> Result<()> {
        let arguments = ["-q", "-t", "ed25519", "-N", "", "-C", "hostd", "-f"];
        run(command("ssh-keygen", arguments).arg(dir.join("key"))).map(|_| ())
    }

    /// The command that runs `arguments` in the machine, word for word. Connections are shared, so
    /// that only the first one pays for the handshake.
    pub(super) fn command(&self, arguments: &[String], terminal: bool) -> Command {
        let mut ssh = command("ssh", ["-q", "-F", "none"]);
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "ControlMaster=auto",
            "ControlPersist=60",
        ] {
            ssh.args(["-o", option]);
        }
        // A path of its own for each machine; sockets' paths are limited to 107 bytes.
        ssh.arg("-o")
            .arg(format!("ControlPath=/tmp/hostd-ssh-{}", self.port));
        ssh.arg("-i").arg(self.dir.join("key"));
        ssh.args(["-p", &self.port.to_string()]);
        ssh.arg(if terminal { "-tt" } else { "-T" });
        ssh.arg("root@127.0.0.1").arg("--");
        ssh.args(arguments.iter().map(|argument| quote(argument)));
        ssh
    }
}

/// ssh joins its arguments with spaces and gives the result to a shell.
fn quote(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn a_word_reaches_the_command_unchanged() {
        for (word, quoted) in [
            ("hostctl", "hostctl"),
            ("", "''"),
            ("a b", "'a b'"),
            ("it's", r"'it'\''s'"),
            ("$HOME", "'$HOME'"),
        ] {
            assert_eq!(quote(word), quoted);
        }
    }
}
