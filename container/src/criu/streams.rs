//! The standard streams of a container's first process, whose other ends are an engine's: by which names
//! they are dumped, so that a restore can put others in their place.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, fstat, makedev, openat};
use rustix::io::fcntl_dupfd_cloexec;

use super::OpenImages;

/// With the images, under runc's name and in its form: a list of three texts.
const FILE: &str = "descriptors.json";
/// Three names that the kernel makes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// What follows the name of a file of the host's: that it is the null device, and shall be again, or that it
/// has a place at which it is read and written.
const NULL: &str = ":/dev/null";
const REGULAR: &str = ":regular";

/// The first number that is no standard stream.
const FIRST_FREE: i32 = 3;

/// What each of the three streams is called, as CRIU does: `pipe:[INODE]`, or `file[MOUNT:INODE]` for a file
/// of the host's. The path is that of a file of the container's own, of which nothing need be said.
#[derive(Debug, PartialEq)]
pub(super) struct Streams(Vec<String>);

impl Streams {
    /// Those of a process.
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        let mounts = mounts_of(pid)?;
        let name = |number: i32| -> io::Result<String> {
            let path = format!("/proc/{pid}/fd/{number}");
            let target = match fs::read_link(&path) {
                Ok(target) => target.to_string_lossy().into_owned(),
                // It is closed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
                Err(error) => return Err(error),
            };
            if !target.starts_with('/') {
                return Ok(target);
            }
            let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
            let mount = mount_of(&info).ok_or(io::ErrorKind::InvalidData)?;
            if mounts.contains(&mount) {
                return Ok(target);
            }
            let stat = fs::metadata(&path)?;
            let what = if stat.rdev() == makedev(1, 3) {
                NULL
            } else if stat.is_file() {
                REGULAR
            } else {
                ""
            };
            Ok(format!("file[{mount:x}:{:x}]{what}", stat.ino()))
        };
        (0..FIRST_FREE)
            .map(name)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Those that a dump must be told of: CRIU knows by itself that a pipe has another end.
    pub(super) fn external(&self) -> impl Iterator<Item = String> {
        let files = self.0.iter().map(|name| key(name));
        let files = files.filter(|name| name.starts_with("file["));
        files
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
            .into_iter()
    }

    pub(super) fn write(&self, images: &OpenImages) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let file = openat(
            &images.directory.descriptor,
            FILE,
            flags,
            Mode::RUSR | Mode::WUSR,
        )?;
        File::from(file).write_all(&serde_json::to_vec(&self.0)?)
    }

    /// Those of a dump. One that was not made by a runtime has no file of them.
    pub(super) fn read(images: &OpenImages) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(&images.directory.descriptor, FILE, flags, Mode::empty())?;
        let mut text = Vec::new();
        File::from(file)
            .take(FILE_BYTES_MAX)
            .read_to_end(&mut text)?;
        Ok(Self(serde_json::from_slice(&text)?))
    }

    /// What takes the place of each, by its name: a stream of the restore, if it has any.
    pub(super) fn replaced(
        &self,
        streams: Option<[BorrowedFd<'_>; 3]>,
    ) -> io::Result<Vec<(String, OwnedFd)>> {
        let mut replaced: Vec<(String, OwnedFd)> = Vec::new();
        for (number, name) in self.0.iter().enumerate() {
            let key = key(name);
            let is_outside = key.starts_with("pipe:[") || key.starts_with("file[");
            if !is_outside || replaced.iter().any(|(other, _)| other == key) {
                continue;
            }
            let opened;
            let stream = if name.ends_with(NULL) {
                opened = File::options().read(true).write(true).open("/dev/null")?;
                Some(opened.as_fd())
            } else {
                streams.and_then(|streams| streams.get(number).copied())
            };
            if let Some(stream) = stream {
                if name.ends_with(REGULAR) {
                    check_file(number, stream)?;
                }
                replaced.push((key.to_owned(), fcntl_dupfd_cloexec(stream, FIRST_FREE)?));
            }
        }
        Ok(replaced)
    }
}

/// The name without what follows it.
fn key(name: &str) -> &str {
    match name.split_once("]:") {
        Some((key, _)) => &name[..=key.len()],
        None => name,
    }
}

/// CRIU opens a file anew, and goes to where the last one was, which nothing else has.
fn check_file(number: usize, stream: BorrowedFd<'_>) -> io::Result<()> {
    let kind = FileType::from_raw_mode(fstat(stream)?.st_mode);
    if kind == FileType::RegularFile {
        return Ok(());
    }
    let name = ["input", "output", "error"]
        .get(number)
        .unwrap_or(&"stream");
    let message = format!("standard {name} was a file, and can only be a file again");
    Err(io::Error::other(message))
}

/// The numbers of the mounts that a process sees.
fn mounts_of(pid: i32) -> io::Result<BTreeSet<u32>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(Path::new(&path))?;
    let number = |line: &str| line.split(' ').next()?.parse().ok();
    Ok(text.lines().filter_map(number).collect())
}

/// The mount of a descriptor, by the text of its fdinfo.
fn mount_of(info: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn pipes_and_files_of_others_are_told_from_files_of_the_processs_own() {
        let mut child = Command::new("sleep")
            .arg("100")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let streams = Streams::of(child.id().cast_signed());
        child.kill().unwrap();
        child.wait().unwrap();
        let streams = streams.unwrap();
        assert!(streams.0[0].starts_with("pipe:["), "{streams:?}");
        // It sees the mounts that this process sees.
        assert_eq!(streams.0[1], "/dev/null");
        assert_eq!(streams.external().count(), 0);
        assert_eq!(mount_of("pos:\t0\nflags:\t02\nmnt_id:\t27\n"), Some(27));
    }

    #[test]
    fn each_name_is_given_once_and_the_null_device_stays_what_it_was() {
        let streams = Streams(
            ["file[1b:5]:/dev/null", "pipe:[7]", "pipe:[7]"]
                .map(str::to_owned)
                .to_vec(),
        );
        assert_eq!(streams.external().collect::<Vec<_>>(), ["file[1b:5]"]);
        let (read, write) = io::pipe().unwrap();
        let given = [read.as_fd(), write.as_fd(), write.as_fd()];
        let replaced = streams.replaced(Some(given)).unwrap();
        let names: Vec<&str> = replaced.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["file[1b:5]", "pipe:[7]"]);
        assert_eq!(fstat(&replaced[0].1).unwrap().st_rdev, makedev(1, 3));
        let (own, its) = (fstat(&write).unwrap(), fstat(&replaced[1].1).unwrap());
        assert_eq!(own.st_ino, its.st_ino);
        assert_eq!(streams.replaced(None).unwrap().len(), 1);
    }
}
