//! The writable disk of a VM: a sparse file with an empty ext4 in it, which is a copy of a template
//! that was made once for each size.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{Whence, lseek64};
use tempfile::NamedTempFile;

use crate::driver::DriverError;

const COPY_BYTES: usize = 128 * 1024;

/// Makes the disk at `path` with `size` bytes, unless it is there.
///
/// # Errors
/// The file system is full, or mke2fs cannot be run.
pub(super) fn ensure(templates: &Path, path: &Path, size: u64) -> Result<(), DriverError> {
    if path.exists() {
        return Ok(());
    }
    let failed = || DriverError::io(format!("making the disk {}", path.display()));
    let template = templates.join(format!("ext4-{size}"));
    if !template.exists() {
        make_template(templates, &template, size)?;
    }
    let directory = path.parent().unwrap_or(path);
    let mut disk = NamedTempFile::new_in(directory).map_err(failed())?;
    let mut source = File::open(&template).map_err(failed())?;
    copy_sparse(&mut source, disk.as_file_mut()).map_err(failed())?;
    // Whole or not at all; a VM that is cut off here makes it again.
    disk.persist(path).map_err(|error| failed()(error.error))?;
    Ok(())
}

fn make_template(templates: &Path, template: &Path, size: u64) -> Result<(), DriverError> {
    let failed = || DriverError::io("making a disk template");
    fs::create_dir_all(templates).map_err(failed())?;
    let file = NamedTempFile::new_in(templates).map_err(failed())?;
    file.as_file().set_len(size).map_err(failed())?;
    let output = Command::new("mke2fs")
        // The guest initialises the tables as it goes, and root needs no reserve.
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        .args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(file.path())
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DriverError::Unavailable {
                message: "mke2fs is not installed".to_owned(),
                hint: "install the package e2fsprogs",
            });
        }
        output => output.map_err(failed())?,
    };
    if !output.status.success() {
        return Err(DriverError::Helper {
            action: "running mke2fs".to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    file.persist(template)
        .map_err(|error| failed()(error.error))?;
    Ok(())
}

/// Copies what is there, and leaves holes where there is nothing.
fn copy_sparse(source: &mut File, target: &mut File) -> io::Result<()> {
    let size = source.metadata()?.len();
    target.set_len(size)?;
    let mut offset = 0;
    while let Some(start) = next_data(source, offset)? {
        let end = u64::try_from(lseek64(&*source, to_signed(start), Whence::SeekHole)?)
            .map_err(io::Error::other)?;
        copy_range(source, target, start, end)?;
        offset = end;
    }
    target.flush()
}

/// Where the next data begins at or after `offset`; `None` if there is none.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match lseek64(file, to_signed(offset), Whence::SeekData) {
        Ok(start) => Ok(u64::try_from(start).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn copy_range(source: &mut File, target: &File, start: u64, end: u64) -> io::Result<()> {
    source.seek(SeekFrom::Start(start))?;
    let mut left = source.take(end - start);
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = start;
    loop {
        let count = left.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        target.write_all_at(&buffer[..count], offset)?;
        offset += u64::try_from(count).unwrap_or(u64::MAX);
    }
}

fn to_signed(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use tempfile::TempDir;

    use super::*;
    use crate::limits::MIB;

    #[test]
    fn a_disk_is_an_empty_file_system_that_takes_little_room() {
        let dir = TempDir::new().unwrap();
        let size = 64 * MIB;
        let (templates, disk) = (dir.path().join("templates"), dir.path().join("disk"));
        ensure(&templates, &disk, size).unwrap();
        let metadata = fs::metadata(&disk).unwrap();
        assert_eq!(metadata.len(), size);
        assert!(
            metadata.blocks() * 512 < size / 4,
            "{} blocks",
            metadata.blocks()
        );
        let check = Command::new("e2fsck")
            .args(["-fn"])
            .arg(&disk)
            .output()
            .unwrap();
        assert!(check.status.success(), "{check:?}");

        fs::write(&disk, "used").unwrap();
        ensure(&templates, &disk, size).unwrap();
        assert_eq!(fs::read(&disk).unwrap(), b"used", "what is there is kept");
    }
}
