//! `hostctl` in a terminal, played by a pseudo-terminal of the test.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::Child;

use hostd::api::types::InstanceSpec;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

use crate::fake_hostd::FakeHostd;

/// The user's side of a terminal, and a descriptor of the other side to look at it by.
struct Screen {
    user: File,
    other: OwnedFd,
}

impl Screen {
    fn new() -> Screen {
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(&size, None).unwrap();
        Screen {
            user: File::from(master),
            other: slave,
        }
    }

    fn spawn(&self, hostd: &FakeHostd, arguments: &[&str]) -> Child {
        let end = || self.other.try_clone().unwrap();
        let mut command = hostd.command(arguments);
        command
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap()
    }

    /// Reads until the screen has shown `text`.
    fn until(&mut self, text: &str) -> String {
        let mut shown = String::new();
        let mut buffer = [0; 1024];
        while !shown.contains(text) {
            let length = self.user.read(&mut buffer).unwrap();
            shown.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
        shown
    }

    /// Whether the terminal edits lines and turns keys into signals, as a shell expects it.
    fn is_cooked(&self) -> bool {
        let flags = tcgetattr(&self.other).unwrap().local_flags;
        flags.contains(LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::ECHO)
    }
}

#[test]
fn keys_go_through_raw_and_the_terminal_is_as_before_afterwards() {
    let hostd = FakeHostd::start();
    let mut screen = Screen::new();
    let mut child = screen.spawn(&hostd, &["run", "-it", "busybox", "early", "0"]);
    screen.until("early");
    screen.user.write_all(b"a\x03\x10\x7fz").unwrap();
    let shown = screen.until("z");
    assert!(shown.contains("a\x03\x10\x7fz"), "{shown:?}");
    assert!(!screen.is_cooked());
    // The workload ends by a signal that hostctl passes on.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert!(screen.is_cooked());
}

#[test]
fn the_detach_keys_leave_the_workload_alone() {
    let hostd = FakeHostd::start();
    let mut screen = Screen::new();
    let mut child = screen.spawn(
        &hostd,
        &["run", "-it", "--name", "web", "busybox", "early", "0"],
    );
    screen.until("early");
    screen.user.write_all(b"\x10\x11").unwrap();
    screen.until("left `web`; it goes on");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(screen.is_cooked());
    assert!(hostd.known.lock().unwrap().instances.contains_key("web"));
}

#[test]
fn a_console_is_left_by_the_detach_keys_and_has_all_others() {
    let hostd = FakeHostd::start();
    hostd.has_vm("box");
    let mut screen = Screen::new();
    let mut child = screen.spawn(&hostd, &["console", "box"]);
    let shown = screen.until("early");
    assert!(shown.contains("ctrl-p ctrl-q leaves it"), "{shown}");
    screen.user.write_all(b"a\x03z").unwrap();
    screen.until("a\x03z");
    assert!(!screen.is_cooked());
    screen.user.write_all(b"\x10\x11").unwrap();
    screen.until("left `box`; it goes on");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(screen.is_cooked());
}

#[test]
fn the_terminals_size_is_passed_on_at_first_and_when_it_changes() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    let mut screen = Screen::new();
    let mut child = screen.spawn(&hostd, &["exec", "-it", "web", "size"]);
    screen.until("24x80");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGWINCH).unwrap();
    screen.until("24x80");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(screen.is_cooked());
}

#[test]
fn people_see_colours() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    let mut screen = Screen::new();
    let mut child = screen.spawn(&hostd, &["list"]);
    let shown = screen.until("running");
    assert!(shown.contains("\x1b[32mrunning"), "{shown:?}");
    assert!(child.wait().unwrap().success());
}
