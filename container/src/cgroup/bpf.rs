//! Loads a device program into the kernel and attaches it to a v2 group: bpf(2).
//!
//! UNSAFETY: bpf(2) takes a pointer to a union whose valid part depends on the command, with
//! further pointers in it. Nothing outside this module sees either; each command has one struct
//! here, in the layout of `union bpf_attr`, and every buffer outlives its call.
#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use super::device_program::Instruction;

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_DETACH: libc::c_int = 9;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const PROG_QUERY: libc::c_int = 16;

const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Programs of groups above and below are asked as well; all of them must allow.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// More programs than this on one group were not put there by us, one at a time.
const PROGRAMS_MAX: usize = 64;

#[derive(Default)]
#[repr(C)]
struct Load {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
    replaced: u32,
}

#[derive(Default)]
#[repr(C)]
struct Query {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
}

#[derive(Default)]
#[repr(C)]
struct ById {
    id: u32,
    next_id: u32,
    open_flags: u32,
}

/// Makes `program` the one device program of the group that `directory` is. What was there stays
/// in force until the new one is.
pub(super) fn attach(directory: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let program = load(program)?;
    let attached = attached(directory)?;
    let request = |flags, replaced: Option<BorrowedFd<'_>>| Attach {
        target: number(directory),
        program: number(program.as_fd()),
        attach_type: ATTACH_CGROUP_DEVICE,
        flags,
        replaced: replaced.map_or(0, number),
    };
    if let [only] = attached.as_slice() {
        let mut replace = request(ALLOW_MULTI | REPLACE, Some(only.as_fd()));
        // SAFETY: the struct is the layout of PROG_ATTACH and has no pointers.
        return unsafe { bpf(PROG_ATTACH, &mut replace) }.map(drop);
    }
    let mut add = request(ALLOW_MULTI, None);
    // SAFETY: the struct is the layout of PROG_ATTACH and has no pointers.
    unsafe { bpf(PROG_ATTACH, &mut add) }?;
    for old in attached {
        let mut detach = Attach {
            program: number(old.as_fd()),
            ..request(0, None)
        };
        // SAFETY: the struct is the layout of PROG_DETACH and has no pointers.
        unsafe { bpf(PROG_DETACH, &mut detach) }?;
    }
    Ok(())
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    // Calls no helper, so any licence will do; the name says the project's.
    let license = c"Apache-2.0";
    let mut request = Load {
        program_type: PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        ..Load::default()
    };
    // SAFETY: the struct is the layout of PROG_LOAD; `program` and `license` live until it returns,
    // and `count` is the length of `program`.
    let fd = unsafe { bpf(PROG_LOAD, &mut request) }?;
    // SAFETY: PROG_LOAD returned a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The device programs attached to the group itself, the group being ours alone.
fn attached(directory: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut ids = [0u32; PROGRAMS_MAX];
    let mut request = Query {
        target: number(directory),
        attach_type: ATTACH_CGROUP_DEVICE,
        ids: ids.as_mut_ptr() as u64,
        count: u32::try_from(ids.len()).map_err(io::Error::other)?,
        ..Query::default()
    };
    // SAFETY: the struct is the layout of PROG_QUERY; `ids` has room for `count` entries and lives
    // until it returns.
    unsafe { bpf(PROG_QUERY, &mut request) }?;
    let count = usize::try_from(request.count).map_err(io::Error::other)?;
    let mut programs = Vec::new();
    for id in ids.iter().take(count) {
        let mut request = ById {
            id: *id,
            ..ById::default()
        };
        // SAFETY: the struct is the layout of PROG_GET_FD_BY_ID and has no pointers.
        let fd = unsafe { bpf(PROG_GET_FD_BY_ID, &mut request) }?;
        // SAFETY: PROG_GET_FD_BY_ID returned a new descriptor that nobody else has.
        programs.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    Ok(programs)
}

/// A descriptor as bpf(2) takes it.
fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

/// Calls bpf(2).
///
/// # Safety
///
/// `request` has the layout that `command` reads and writes, and its pointers are valid for it.
unsafe fn bpf<T>(command: libc::c_int, request: &mut T) -> io::Result<i32> {
    // SAFETY: the caller upholds what the command needs; the size is that of the struct, beyond
    // which the kernel neither reads nor writes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(request),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::process::CommandExt,
        path::Path,
        process::{self, Command},
    };

    use super::{
        super::{
            device_program::program,
            devices::tests::rules,
            hierarchy::{Version, hierarchies},
        },
        *,
    };

    /// Which of null, zero and full a process in the group can read.
    fn readable(group: &Path) -> String {
        // No redirection to /dev/null, which may be denied.
        let script = "for d in null zero full; do \
                      if (exec < /dev/$d) 2>&-; then echo -n y; else echo -n n; fi; done";
        let procs = fs::OpenOptions::new()
            .write(true)
            .open(group.join("cgroup.procs"))
            .unwrap();
        let join = move || Ok(nix::unistd::write(&procs, b"0").map(drop)?);
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", script])
            .stdin(process::Stdio::inherit());
        // SAFETY: `join` only writes to an open file.
        let output = unsafe { command.pre_exec(join) }.output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// Removes the group, also if the test fails.
    struct Group(std::path::PathBuf);

    impl Drop for Group {
        fn drop(&mut self) {
            fs::remove_dir(&self.0).unwrap();
        }
    }

    #[test]
    fn the_kernel_takes_the_program_and_the_latest_one_holds() {
        let unified = hierarchies()
            .unwrap()
            .iter()
            .find(|have| have.version == Version::V2);
        let root = &unified.expect("this kernel has cgroup v2").root;
        let group = Group(root.join(format!("hostd-test-bpf-{}", process::id())));
        fs::create_dir(&group.0).unwrap();
        let directory = fs::File::open(&group.0).unwrap();
        assert_eq!(readable(&group.0), "yyy");
        for (list, result) in [
            (r#"[]"#, "yyy"),
            (
                r#"[{"allow":false,"type":"c","major":1,"minor":5,"access":"r"}]"#,
                "yny",
            ),
            (
                r#"[{"allow":false,"access":"rwm"},
                 {"allow":false,"type":"c","major":1,"access":"r"},
                 {"allow":true,"type":"c","major":1,"minor":7,"access":"rw"}]"#,
                "nny",
            ),
            (r#"[{"allow":true,"access":"rwm"}]"#, "yyy"),
        ] {
            attach(directory.as_fd(), &program(&rules(list).unwrap())).unwrap();
            assert_eq!(readable(&group.0), result, "{list}");
            assert_eq!(attached(directory.as_fd()).unwrap().len(), 1);
        }
    }
}
