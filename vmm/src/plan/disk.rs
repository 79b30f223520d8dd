//! Disks, as they were asked for.

use super::opener::{Access, Opener, lock};
use super::{PlanError, range};
use crate::spec::{Backing, Disk, DiskFormat, DiskLimits};
use crate::virtio::block::Layer;

/// The longest serial number of a disk.
pub const SERIAL_BYTES_MAX: usize = 20;
/// The most images behind each other.
pub const BACKING_FILES_MAX: usize = 16;

/// A disk, open and, if it can be written, locked against other machines.
#[derive(Debug)]
pub struct DiskPlan {
    /// As in the machine's statistics.
    pub name: String,
    pub top: Layer,
    /// What `top` refers to; each refers to the next.
    pub backing: Vec<Layer>,
    pub read_only: bool,
    pub serial: Option<String>,
    pub limits: DiskLimits,
}

/// Checks what is to be said of a disk without its files.
pub(super) fn check(field: &str, disk: &Disk) -> Result<(), PlanError> {
    if let Some(serial) = &disk.serial
        && serial.len() > SERIAL_BYTES_MAX
    {
        let field = format!("{field}/serial");
        let found = format!("{} bytes long", serial.len());
        let wanted = format!("at most {SERIAL_BYTES_MAX}");
        return Err(range(&field, found, wanted));
    }
    if let Some(limit) = disk.limits.zero() {
        let field = format!("{field}/limits/{limit}");
        return Err(range(&field, "0".to_owned(), "1 or more, or absent"));
    }
    if disk.format == DiskFormat::Raw && !disk.backing.is_empty() {
        let field = format!("{field}/backing");
        let found = format!("{} files", disk.backing.len());
        return Err(range(
            &field,
            found,
            "absent: a raw image refers to no other",
        ));
    }
    if disk.backing.len() > BACKING_FILES_MAX {
        let field = format!("{field}/backing");
        let found = format!("{} files", disk.backing.len());
        let wanted = format!("at most {BACKING_FILES_MAX} files");
        return Err(range(&field, found, wanted));
    }
    Ok(())
}

impl Opener {
    pub(super) fn disk(
        &mut self,
        field: &str,
        number: u16,
        disk: &Disk,
    ) -> Result<DiskPlan, PlanError> {
        check(field, disk)?;
        let access = if disk.read_only {
            Access::Read
        } else {
            Access::ReadWrite
        };
        let path = format!("{field}/path");
        let file = self.file(&path, &disk.path, access)?;
        lock(&path, &file, disk.read_only)?;
        let backing = self.each(&format!("{field}/backing"), &disk.backing, Self::backing)?;
        Ok(DiskPlan {
            name: format!("disk{number}"),
            top: Layer {
                file,
                format: disk.format,
            },
            backing,
            read_only: disk.read_only,
            serial: disk.serial.clone(),
            limits: disk.limits,
        })
    }

    fn backing(&mut self, field: &str, backing: &Backing) -> Result<Layer, PlanError> {
        let field = format!("{field}/path");
        let file = self.file(&field, &backing.path, Access::Read)?;
        lock(&field, &file, true)?;
        Ok(Layer {
            file,
            format: backing.format,
        })
    }
}
