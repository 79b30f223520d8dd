//! Opens what of the host the confined process gets: before the walls go up, and as who may.

use std::{
    fs::{self, OpenOptions},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use rustix::{fs::Mode, process::umask};

use super::{MonitorError, protocol::Descriptor, tap};

/// Files that were made, removed again unless [`Made::keep`] is called.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    pub(super) fn add(&mut self, path: &Path) {
        self.0.push(path.to_owned());
    }

    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            fs::remove_file(path).ok();
        }
    }
}

/// Opens all descriptors in their order, and adds the files that are new to `made`.
pub(super) fn open(
    descriptors: &[Descriptor],
    made: &mut Made,
) -> Result<Vec<OwnedFd>, MonitorError> {
    let open = |(index, descriptor): (usize, &Descriptor)| {
        open_one(descriptor, made).map_err(|source| MonitorError::Descriptor {
            index,
            what: match descriptor {
                Descriptor::File { path, .. }
                | Descriptor::Create { path }
                | Descriptor::Listener { path } => path.display().to_string(),
                Descriptor::Tap { name } => format!("the tap {name}"),
            },
            source,
        })
    };
    descriptors.iter().enumerate().map(open).collect()
}

fn open_one(descriptor: &Descriptor, made: &mut Made) -> io::Result<OwnedFd> {
    match descriptor {
        Descriptor::File { path, write } => {
            let flags = libc::O_NOCTTY;
            let file = OpenOptions::new()
                .read(true)
                .write(*write)
                .custom_flags(flags)
                .open(path)?;
            Ok(file.into())
        }
        Descriptor::Create { path } => {
            let mut options = OpenOptions::new();
            options
                .read(true)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW);
            match options.clone().create_new(true).open(path) {
                Ok(file) => {
                    made.add(path);
                    Ok(file.into())
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    Ok(options.truncate(true).open(path)?.into())
                }
                Err(error) => Err(error),
            }
        }
        Descriptor::Tap { name } => Ok(tap::open(name)?.into()),
        Descriptor::Listener { path } => {
            let listener = listen(path)?;
            made.add(path);
            Ok(listener.into())
        }
    }
}

/// Listens at `path`, with mode 0600; a socket that is there already is a leftover.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // The process has one thread, so nobody else makes a file meanwhile.
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_was_made_is_removed_if_a_later_one_fails_and_what_was_there_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        fs::write(path("old"), "content").unwrap();
        let mut descriptors = vec![
            Descriptor::File {
                path: path("old"),
                write: false,
            },
            Descriptor::Create { path: path("new") },
            Descriptor::Listener {
                path: path("socket"),
            },
        ];
        let mut made = Made::default();
        assert_eq!(open(&descriptors, &mut made).unwrap().len(), 3);
        let mode = fs::metadata(path("new")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mode = fs::metadata(path("socket")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(made);
        assert!(!path("new").exists() && !path("socket").exists() && path("old").exists());

        descriptors.push(Descriptor::Tap {
            name: "no-such-tap".to_owned(),
        });
        let error = open(&descriptors, &mut Made::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "descriptors[3]: cannot open the tap no-such-tap"
        );
    }

    #[test]
    fn a_leftover_socket_is_replaced_and_another_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(listen(&path).unwrap());
        assert!(path.exists(), "closing a socket leaves its file");
        listen(&path).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        listen(&directory.path().join("file")).unwrap_err();
    }
}
