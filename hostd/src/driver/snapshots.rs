//! Snapshots: copies of what an instance has written, kept beside it, for both kinds.
//!
//! A snapshot is a directory below `snapshots` in the instance's own. What is not finished, or is on
//! its way out, has a name that starts with a dot, as no snapshot's does; the next hostd removes it.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use rustix::fs::{CWD, RenameFlags};
use tokio_util::sync::CancellationToken;

use super::confined::{Engine, blocking};
use super::copy::{Copier, CopyError};
use super::{DriverError, chain};
use crate::store::Record;

/// What is to take the place of what an instance has written.
const STAGED: &str = ".staged";
/// The snapshots of an instance that is being removed.
const GONE: &str = ".gone";

/// A snapshot by name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SnapshotName {
    pub instance: String,
    pub snapshot: String,
}

/// Takes snapshots of instances of one kind, and makes instances go on from them.
pub trait Snapshots: Send + Sync + 'static {
    /// Keeps what the instance has written, and with `memory` where it is; returns how many bytes
    /// of the disk that takes at most. An instance that runs stands still meanwhile and runs on
    /// afterwards, also if this fails; then nothing is left behind.
    fn capture<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
        memory: bool,
    ) -> BoxFuture<'a, Result<u64, DriverError>>;

    /// Copies what a snapshot holds, with `memory` that as well, to beside what the instance has,
    /// which may run meanwhile.
    fn stage<'a>(
        &'a self,
        record: &'a Record,
        source: &'a SnapshotName,
        memory: bool,
    ) -> BoxFuture<'a, Result<(), DriverError>>;

    /// Has what was staged take the place of what the instance has written. It must not run. With
    /// memory, its next start goes on from there.
    fn install<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<(), DriverError>>;

    /// Removes a snapshot. Doing it twice is doing it once.
    fn discard<'a>(
        &'a self,
        record: &'a Record,
        snapshot: &'a str,
    ) -> BoxFuture<'a, Result<(), DriverError>>;

    /// Removes what an earlier hostd has left unfinished: everything but the snapshots `known`.
    fn tidy<'a>(
        &'a self,
        record: &'a Record,
        known: &'a [String],
    ) -> BoxFuture<'a, Result<(), DriverError>>;
}

/// A snapshot that is being written.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) path: PathBuf,
    finished: PathBuf,
}

impl Engine {
    /// Makes an empty place for a snapshot.
    pub(super) fn draft(&self, record: &Record, snapshot: &str) -> Result<Draft, DriverError> {
        let name = &record.instance.name;
        let snapshots = self.paths.snapshots(name);
        let draft = Draft {
            path: snapshots.join(format!(".new-{snapshot}")),
            finished: snapshots.join(snapshot),
        };
        let made = fs::create_dir_all(self.paths.instance_state(name))
            .and_then(|()| remove_any(&draft.path))
            .and_then(|()| {
                // A guest's memory is full of secrets.
                let mut builder = DirBuilder::new();
                builder.mode(0o700).recursive(true).create(&draft.path)
            });
        made.map_err(DriverError::io("making a place for the snapshot"))?;
        Ok(draft)
    }

    /// Copies what the instance has written, which is `content` in its directory, into a draft.
    pub(super) async fn copy_out(
        &self,
        record: &Record,
        content: &'static str,
        draft: &Draft,
    ) -> Result<u64, DriverError> {
        let state = self.paths.instance_state(&record.instance.name);
        let (source, target) = (state.join(content), draft.path.join(content));
        let stopping = self.stopping.clone();
        blocking(move || copy(stopping, &source, &target))
            .await
            .map_err(|error| error.during("copying what the instance has written"))
    }

    /// Makes a draft a snapshot, or removes it if something has failed.
    pub(super) async fn finish(
        &self,
        draft: Draft,
        outcome: Result<u64, DriverError>,
    ) -> Result<u64, DriverError> {
        blocking(move || {
            let finished = outcome.and_then(|bytes| {
                sync(&draft.path)
                    .and_then(|()| fs::rename(&draft.path, &draft.finished))
                    .and_then(|()| sync(&draft.finished))
                    .map_err(DriverError::io("keeping the snapshot"))?;
                Ok(bytes)
            });
            if finished.is_err()
                && let Err(error) = remove_any(&draft.path)
            {
                // The first error is the one that explains.
                tracing::warn!(
                    error = chain(&error),
                    "a failed snapshot left something behind"
                );
            }
            finished
        })
        .await
    }

    pub(super) async fn stage(
        &self,
        record: &Record,
        content: &'static str,
        source: &SnapshotName,
    ) -> Result<(), DriverError> {
        let snapshot = self.paths.snapshots(&source.instance);
        let snapshot = snapshot.join(&source.snapshot);
        let state = self.paths.instance_state(&record.instance.name);
        let stopping = self.stopping.clone();
        blocking(move || {
            let staged = state.join(STAGED);
            let failed = || DriverError::io("copying the snapshot");
            let before = inode(&snapshot).map_err(failed())?;
            fs::create_dir_all(&state).map_err(failed())?;
            remove_any(&staged).map_err(failed())?;
            copy(stopping, &snapshot.join(content), &staged)
                .map_err(|error| error.during("copying the snapshot"))?;
            sync(&state).map_err(failed())?;
            // A snapshot loses its name before anything in it is removed.
            if inode(&snapshot).ok() == Some(before) {
                return Ok(());
            }
            Err(DriverError::Helper {
                action: "copying the snapshot".to_owned(),
                message: "it was removed meanwhile".to_owned(),
            })
        })
        .await
    }

    pub(super) async fn install(
        &self,
        record: &Record,
        content: &'static str,
    ) -> Result<(), DriverError> {
        let state = self.paths.instance_state(&record.instance.name);
        blocking(move || {
            exchange(&state.join(STAGED), &state.join(content))
                .and_then(|()| sync(&state))
                .map_err(DriverError::io("putting the snapshot's files in place"))?;
            // What is left now is what the instance had. It is of no use, and in nobody's way.
            if let Err(error) = remove_any(&state.join(STAGED)) {
                tracing::warn!(
                    error = chain(&error),
                    "what a restore replaced is left behind"
                );
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn discard(&self, record: &Record, snapshot: &str) -> Result<(), DriverError> {
        let snapshots = self.paths.snapshots(&record.instance.name);
        let (snapshot, gone) = (snapshots.join(snapshot), snapshots.join(GONE));
        blocking(move || retire(&snapshot, &gone))
            .await
            .map_err(DriverError::io("removing the snapshot"))
    }

    /// Takes all snapshots out of the way of an instance's removal: who copies from one sees that it
    /// has gone, and does not take half of it for the whole.
    pub(super) async fn discard_all(&self, name: &str) -> Result<(), DriverError> {
        let (snapshots, state) = (self.paths.snapshots(name), self.paths.instance_state(name));
        blocking(move || retire(&snapshots, &state.join(GONE)))
            .await
            .map_err(DriverError::io("removing the snapshots"))
    }

    pub(super) async fn tidy(&self, record: &Record, known: &[String]) -> Result<(), DriverError> {
        let name = &record.instance.name;
        let (state, snapshots) = (self.paths.instance_state(name), self.paths.snapshots(name));
        let known = known.to_vec();
        blocking(move || {
            let unfinished = |name: &OsStr| name.as_bytes().starts_with(b".");
            remove_those(&state, unfinished)?;
            remove_those(&snapshots, |name| {
                known.iter().all(|known| name != known.as_str())
            })
        })
        .await
        .map_err(DriverError::io(
            "removing what is left of unfinished snapshots",
        ))
    }
}

/// Copies a file or a tree, if it is there. An instance that never ran has written nothing.
fn copy(stopping: CancellationToken, source: &Path, target: &Path) -> Result<u64, CopyError> {
    let mut copier = Copier::begin(stopping);
    let found = match fs::symlink_metadata(source) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        found => found.map_err(CopyError::io("read", &source.display()))?,
    };
    if found.is_dir() {
        copier.tree(source, target)?;
    } else {
        let mut from = File::open(source).map_err(CopyError::io("open", &source.display()))?;
        let mut options = File::options();
        let to = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(target);
        let to = to.map_err(CopyError::io("make", &target.display()))?;
        copier.file(&mut from, &to, &source.display().to_string())?;
    }
    Ok(copier.bytes)
}

/// Has `new` take the place of `old`, in one step, and leaves the latter in the place of the former.
/// If there is no `new`, there is no `old` either afterwards.
fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    let exchanged = rustix::fs::renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE);
    match exchanged {
        Err(rustix::io::Errno::NOENT) if exists(new)? => fs::rename(new, old),
        Err(rustix::io::Errno::NOENT) if exists(old)? => fs::rename(old, new),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        exchanged => Ok(exchanged?),
    }
}

/// Removes a directory; its name is free before anything in it has gone.
fn retire(directory: &Path, gone: &Path) -> io::Result<()> {
    remove_any(gone)?;
    match fs::rename(directory, gone) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        renamed => renamed?,
    }
    remove_any(gone)
}

fn remove_those(directory: &Path, unwanted: impl Fn(&OsStr) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if unwanted(&entry.file_name()) {
            tracing::warn!(path = %entry.path().display(), "an unfinished copy is removed");
            remove_any(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a file or a tree, if it is there.
pub(super) fn remove_any(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn exists(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        found => found.map(|_| true),
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Brings the whole file system that a directory is on to the disk, since a copy may be of many files.
fn sync(directory: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(File::open(directory)?)?)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn what_is_new_takes_the_place_of_what_is_old_whatever_there_is() {
        for (new, old, after) in [
            (Some("n"), Some("o"), (Some("o"), Some("n"))),
            (Some("n"), None, (None, Some("n"))),
            (None, Some("o"), (Some("o"), None)),
            (None, None, (None, None)),
        ] {
            let dir = TempDir::new().unwrap();
            let paths = [dir.path().join("new"), dir.path().join("old")];
            for (path, text) in paths.iter().zip([new, old]) {
                if let Some(text) = text {
                    fs::write(path, text).unwrap();
                }
            }
            exchange(&paths[0], &paths[1]).unwrap();
            let [new, old] = paths.map(|path| fs::read_to_string(path).ok());
            assert_eq!((new.as_deref(), old.as_deref()), after);
        }
    }

    #[test]
    fn a_copy_is_of_a_file_a_tree_or_nothing() {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("tree")).unwrap();
        fs::write(path("tree/file"), "data").unwrap();
        let copied = |name: &str, to: &str| {
            copy(CancellationToken::new(), &path(name), &path(to)).unwrap();
        };
        copied("tree", "tree2");
        copied("tree/file", "file2");
        copied("nothing", "nothing2");
        assert_eq!(fs::read_to_string(path("tree2/file")).unwrap(), "data");
        assert_eq!(fs::read_to_string(path("file2")).unwrap(), "data");
        assert!(!exists(&path("nothing2")).unwrap());
    }

    #[test]
    fn what_is_retired_is_gone_and_so_is_what_was_before_it() {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["one/deep", ".gone/older"] {
            fs::create_dir_all(path(name)).unwrap();
        }
        retire(&path("one"), &path(GONE)).unwrap();
        retire(&path("one"), &path(GONE)).unwrap();
        fs::create_dir_all(path(".new-x")).unwrap();
        fs::write(path("kept"), "").unwrap();
        remove_those(dir.path(), |name| name.as_bytes().starts_with(b".")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
