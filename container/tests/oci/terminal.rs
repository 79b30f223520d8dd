//! Terminals of containers: whose the other side is, and what is relayed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use serde_json::json;

use crate::bundle::{Bundle, finish_child};

#[test]
fn an_engine_gets_the_terminal_over_its_console_socket() {
    let bundle = Bundle::new(
        "tty; stty size; ls -l /dev/console >/dev/null && echo console; exec sleep 100",
    )
    .with(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 33, "width": 99});
    });
    let socket = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap().to_owned();
    let ended = bundle.quiet(&["create", "--console-socket", &path]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let (connection, _) = listener.accept().unwrap();
    let master = receive_descriptor(&connection);
    assert_eq!(bundle.verb(&["start"], &[]).status, 0);
    let mut lines = BufReader::new(master).lines();
    for expected in ["/dev/pts/0", "33 99", "console"] {
        assert_eq!(lines.next().unwrap().unwrap(), expected);
    }
}

pub(crate) fn receive_descriptor(socket: &std::os::unix::net::UnixStream) -> File {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 64];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
            return File::from(descriptors.next().unwrap());
        }
    }
    panic!("no descriptor came");
}

#[test]
fn a_terminal_and_a_console_socket_go_together() {
    let bundle = Bundle::new("true");
    let socket = bundle.path().join("console.sock");
    let _listener = UnixListener::bind(&socket).unwrap();
    let ended = bundle.verb(&["run", "--console-socket", socket.to_str().unwrap()], &[]);
    assert!(
        ended.stderr.contains("process.terminal is not true"),
        "{ended:?}"
    );
    bundle.assert_nothing_is_left();
}

#[test]
fn a_terminal_that_nobody_would_hold_is_refused() {
    let bundle = Bundle::new("true").with(|config| config["process"]["terminal"] = json!(true));
    for verb in [&["create"][..], &["run", "--detach"]] {
        let ended = bundle.quiet(verb);
        assert!(
            ended.stderr.contains("a terminal needs a console socket"),
            "{ended:?}"
        );
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn run_relays_a_terminal() {
    let bundle = Bundle::new("test -t 0 && test -t 1 && echo yes; exit 4")
        .with(|config| config["process"]["terminal"] = json!(true));
    let ended = bundle.run();
    assert_eq!((ended.status, ended.stdout.as_str()), (4, "yes\n"));
}

/// What a command writes to a terminal.
fn shown_by(mut command: Command) -> String {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    unlockpt(&master).unwrap();
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, peer).unwrap();
    command.stdin(slave.try_clone().unwrap()).stdout(slave);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    // It has the other side, too.
    drop(command);
    let ended = finish_child(child);
    assert_eq!(ended.status, 0, "{ended:?}");
    let mut shown = Vec::new();
    // It fails when nobody has the other side any more.
    let end = File::from(master).read_to_end(&mut shown).unwrap_err();
    assert_eq!(end.raw_os_error(), Some(libc::EIO));
    String::from_utf8(shown).unwrap()
}

#[test]
fn only_for_a_terminal_do_lines_end_as_a_terminals() {
    let bundle = Bundle::new("echo one; echo two >/dev/console")
        .with(|config| config["process"]["terminal"] = json!(true));
    // In a pipe they are as the program wrote them.
    assert_eq!(bundle.run().stdout, "one\ntwo\n");
    let mut command = bundle.command(&["run"]);
    command.arg(&bundle.id);
    assert_eq!(shown_by(command), "one\r\ntwo\r\n");
}
