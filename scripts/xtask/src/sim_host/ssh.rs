//! The way into the simulated host.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

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

    /// Opens the connection that all commands share, so that only it pays for the handshake. It
    /// stays in the background until [`close`](Self::close) or the end of the machine.
    ///
    /// Apart from the commands: ssh's own way, to let the first command's connection stay, leaves a
    /// process behind that holds that command's streams, and with them whoever reads them.
    pub(super) fn open(&self) -> Result<()> {
        let mut ssh = self.client();
        ssh.args(["-M", "-N", "-f", "root@127.0.0.1"]);
        ssh.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = ssh.status().context("Cannot run ssh")?;
        if !status.success() {
            bail!("The machine lets nobody in; ssh ended with {status}");
        }
        Ok(())
    }

    /// Ends the shared connection.
    pub(super) fn close(&self) {
        let mut ssh = self.client();
        ssh.args(["-O", "exit", "root@127.0.0.1"]);
        // If there is none, that is well too.
        let _ = ssh
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }

    /// The command that runs `arguments` in the machine, word for word.
    pub(super) fn command(&self, arguments: &[String], terminal: bool) -> Command {
        let mut ssh = self.client();
        ssh.arg(if terminal { "-tt" } else { "-T" });
        ssh.arg("root@127.0.0.1").arg("--");
        ssh.args(arguments.iter().map(|argument| quote(argument)));
        ssh
    }

    /// ssh with the options that all uses share.
    fn client(&self) -> Command {
        let mut ssh = command("ssh", ["-q", "-F", "none"]);
        for option in [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            // A machine was seen to sleep for minutes, with work to do, until somebody connected: as if an
            // interrupt of its timer had been lost. A packet wakes it. It may be too busy to answer.
            "ServerAliveInterval=5",
            "ServerAliveCountMax=1000",
        ] {
            ssh.args(["-o", option]);
        }
        // A path of its own for each machine; sockets' paths are limited to 107 bytes.
        ssh.arg("-o")
            .arg(format!("ControlPath=/tmp/hostd-ssh-{}", self.port));
        ssh.arg("-i").arg(self.dir.join("key"));
        ssh.args(["-p", &self.port.to_string()]);
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
