//! Processes by pid *and* start time, so that a number that was given out again is not mistaken.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One process for all time (until the next boot).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Identity {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    pub start_time: u64,
}

impl Identity {
    /// The process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        let start_time = start_time(pid)?;
        Some(Self { pid, start_time })
    }

    /// A process whose arguments satisfy `wanted`.
    pub fn find_by_arguments(wanted: impl Fn(&[&[u8]]) -> bool) -> Option<Self> {
        let processes = fs::read_dir("/proc").ok()?;
        processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .find_map(|pid: i32| {
                let identity = Self::of(pid)?;
                let line = fs::read(proc(pid).join("cmdline")).ok()?;
                let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
                wanted(&arguments).then_some(identity)
            })
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Kills it, if it still is that process.
    pub fn kill(&self) {
        if self.is_alive() {
            // It may have ended meanwhile, which is what is wanted.
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn proc(pid: i32) -> PathBuf {
    PathBuf::from("/proc").join(pid.to_string())
}

/// `None` if there is no such process, or it has ended and waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(proc(pid).join("stat")).ok()?;
    // The name, field 2, is in parentheses and may hold anything, parentheses and spaces included.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn a_process_is_known_by_its_arguments_until_it_ends() {
        let mut child = Command::new("sleep").arg("86399.125").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let identity = Identity::of(pid).unwrap();
        assert!(identity.is_alive());
        // The child may not have executed its program when it is looked at first.
        let found =
            || Identity::find_by_arguments(|arguments| arguments.contains(&&b"86399.125"[..]));
        while found().is_none() {}
        assert_eq!(found(), Some(identity));
        identity.kill();
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }

    #[test]
    fn another_process_with_the_same_number_is_not_the_same() {
        let me = Identity::of(i32::try_from(id()).unwrap()).unwrap();
        let other = Identity {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(me.is_alive() && !other.is_alive());
        other.kill();
    }
}
