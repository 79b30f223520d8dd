//! The exit record: how the workload ended, on disk so that every later observer finds it.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use jiff::Timestamp;

use super::protocol::ExitRecord;
use crate::process::Exit;

pub(super) const FILE: &str = "exit.json";

/// The status of a shell or an init whose child died of SIGKILL, and that passes it on.
const KILLED_STATUS: i32 = 128 + libc::SIGKILL;

/// `oom_kills` is how often the kernel killed for want of memory in the workload's cgroup.
pub(super) fn record(exit: Exit, oom_kills: u64) -> ExitRecord {
    let (code, signal) = match exit {
        Exit::Code(code) => (Some(code), None),
        Exit::Signal(signal) => (None, Some(signal)),
    };
    let killed = signal == Some(libc::SIGKILL) || code == Some(KILLED_STATUS);
    ExitRecord {
        code,
        signal,
        oom: killed && oom_kills > 0,
        finished_at: Timestamp::now(),
    }
}

/// Writes `record` into `dir`, whole or not at all, and so that it survives a crash of the host.
pub(super) fn write(dir: &Path, record: &ExitRecord) -> io::Result<()> {
    let temporary = dir.join(".exit.json.new");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn want_of_memory_is_told_only_of_who_was_killed() {
        for (exit, kills, code, signal, oom) in [
            (Exit::Code(0), 3, Some(0), None, false),
            (Exit::Code(137), 1, Some(137), None, true),
            (Exit::Code(137), 0, Some(137), None, false),
            (Exit::Signal(9), 1, None, Some(9), true),
            (Exit::Signal(9), 0, None, Some(9), false),
            (Exit::Signal(15), 1, None, Some(15), false),
        ] {
            let record = record(exit, kills);
            assert_eq!(
                (record.code, record.signal, record.oom),
                (code, signal, oom),
                "{exit:?}"
            );
        }
    }

    #[test]
    fn a_record_replaces_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        for exit in [Exit::Code(1), Exit::Signal(9)] {
            let written = record(exit, 0);
            write(directory.path(), &written).unwrap();
            let text = fs::read_to_string(directory.path().join(FILE)).unwrap();
            assert_eq!(serde_json::from_str::<ExitRecord>(&text).unwrap(), written);
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
