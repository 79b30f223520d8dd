//! The writable disk of a VM: a sparse file with an empty ext4 in it, which is a copy of a template
//! that was made once for each size.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::NamedTempFile;
use tokio_util::sync::CancellationToken;

use crate::driver::DriverError;
use crate::driver::copy::Copier;

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
    let disk = NamedTempFile::new_in(directory).map_err(failed())?;
    let mut source = File::open(&template).map_err(failed())?;
    // It holds little but holes, so that nobody has to be able to call it off.
    Copier::begin(CancellationToken::new())
        .file(&mut source, disk.as_file(), "the template")
        .map_err(|error| error.during(&format!("making the disk {}", path.display())))?;
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
