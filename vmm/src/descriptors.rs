//! Files by name or by inherited descriptor: `fd:N` wherever a path may stand. The standard streams,
//! which this program goes on to use, are duplicated; the others are taken over.
//!
//! UNSAFETY: a descriptor's number is all that is inherited, and only the one who started this
//! process knows what it is for. Each number is taken once.
#![expect(
    unsafe_code,
    reason = "an inherited descriptor can only be taken over by its number"
)]

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Why a file is not there.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    #[error("{0:?} is not a descriptor: `fd:` is followed by a number")]
    Syntax(String),
    #[error("descriptor {0} stands twice; each but the standard streams can be used once")]
    Twice(RawFd),
    #[error("descriptor {number} was not inherited")]
    Closed { number: RawFd, source: io::Error },
    #[error("cannot open {path}")]
    Open { path: String, source: io::Error },
}

/// The descriptors that this process was started with, as far as they are still to be taken.
#[derive(Debug, Default)]
pub struct Inherited {
    taken: BTreeSet<RawFd>,
}

impl Inherited {
    /// Opens `path` with `options`, or takes the descriptor it names.
    pub fn open(&mut self, path: &Path, options: &OpenOptions) -> Result<File, DescriptorError> {
        if let Some(descriptor) = self.descriptor(path)? {
            return Ok(descriptor.into());
        }
        options.open(path).map_err(|source| DescriptorError::Open {
            path: path.display().to_string(),
            source,
        })
    }

    /// The descriptor that `path` names, if it names one.
    pub fn descriptor(&mut self, path: &Path) -> Result<Option<OwnedFd>, DescriptorError> {
        let Some(number) = path.to_str().and_then(|path| path.strip_prefix("fd:")) else {
            return Ok(None);
        };
        let number = match number.parse() {
            Ok(number) if number >= 0 => number,
            _ => return Err(DescriptorError::Syntax(format!("fd:{number}"))),
        };
        let closed = |source| DescriptorError::Closed { number, source };
        let standard = match number {
            0 => Some(io::stdin().as_fd().try_clone_to_owned()),
            1 => Some(io::stdout().as_fd().try_clone_to_owned()),
            2 => Some(io::stderr().as_fd().try_clone_to_owned()),
            _ => None,
        };
        if let Some(duplicate) = standard {
            return duplicate.map(Some).map_err(closed);
        }
        if !self.taken.insert(number) {
            return Err(DescriptorError::Twice(number));
        }
        // SAFETY: used for one call that fails if there is no such descriptor.
        let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|errno| closed(errno.into()))?;
        // SAFETY: it is open, and it is ours alone: whoever started this process named it in the
        // specification, and `taken` lets nobody have it twice. Plans are made before this process
        // opens anything whose number could be mistaken for an inherited one.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once() {
        let file = tempfile::tempfile().unwrap();
        let path = format!("fd:{}", file.into_raw_fd());
        let mut inherited = Inherited::default();
        let first = inherited.descriptor(path.as_ref());
        assert!(matches!(first, Ok(Some(_))));
        let second = inherited.descriptor(path.as_ref());
        assert!(matches!(second, Err(DescriptorError::Twice(_))));
    }

    #[test]
    fn the_standard_streams_stay() {
        let mut inherited = Inherited::default();
        for path in ["fd:0", "fd:1", "fd:2", "fd:1"] {
            let duplicate = inherited.descriptor(path.as_ref()).unwrap().unwrap();
            assert!(duplicate.as_raw_fd() > 2);
        }
        io::stdout().as_fd().try_clone_to_owned().unwrap();
    }

    #[test]
    fn what_is_no_descriptor_is_refused_and_a_path_is_a_path() {
        for path in ["fd:", "fd:x", "fd:-1", "fd:99999999999"] {
            let result = Inherited::default().descriptor(path.as_ref());
            assert!(matches!(result, Err(DescriptorError::Syntax(_))), "{path}");
        }
        let closed = Inherited::default().descriptor("fd:1000000".as_ref());
        assert!(matches!(closed, Err(DescriptorError::Closed { .. })));
        let path = Inherited::default().descriptor("/fd:3".as_ref());
        assert!(matches!(path, Ok(None)));
    }
}
