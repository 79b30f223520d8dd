//! Loads the kernel modules of the initramfs.

use std::fs::{self, File};
use std::io;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::SetUpError;

/// Paths of module files, a line each, in the order that they load in. What is built into the kernel
/// is not among them.
const LIST: &str = "/hostd/modules";

pub(super) fn load_all() -> Result<(), SetUpError> {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(SetUpError::Module {
                path: LIST.into(),
                source,
            });
        }
    };
    for path in list.lines() {
        load(path).map_err(|source| SetUpError::Module {
            path: path.into(),
            source,
        })?;
    }
    Ok(())
}

fn load(path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    match finit_module(file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
