//! Named volumes: directories of hostd's that outlive the instances that use them.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::api::types::MountSpec;
use crate::validate::FieldError;

/// The host's path for each mount; a volume that is not there is made.
///
/// # Errors
/// A path of the host is not there, or a volume cannot be made.
pub fn sources(volumes: &Path, mounts: &[MountSpec]) -> Result<Vec<PathBuf>, FieldError> {
    let source = |(index, mount): (usize, &MountSpec)| {
        let field = format!("/mounts/{index}/source");
        if mount.source.starts_with('/') {
            let path = PathBuf::from(&mount.source);
            return match fs::metadata(&path) {
                Ok(_) => Ok(path),
                Err(error) => Err(
                    FieldError::new(field, format!("`{}`: {error}", mount.source))
                        .hint("make it first, or name a volume"),
                ),
            };
        }
        let path = volumes.join(&mount.source);
        match make(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(FieldError::new(
                field,
                format!("the volume `{}` cannot be made: {error}", mount.source),
            )),
        }
    };
    mounts.iter().enumerate().map(source).collect()
}

fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn mount(source: &str) -> MountSpec {
        MountSpec {
            source: source.to_owned(),
            target: "/data".to_owned(),
            read_only: false,
        }
    }

    #[test]
    fn a_volume_is_made_and_a_path_must_be_there() {
        let dir = TempDir::new().unwrap();
        let found = sources(dir.path(), &[mount("data"), mount("/")]).unwrap();
        assert_eq!(found, [dir.path().join("data"), PathBuf::from("/")]);
        assert!(found[0].is_dir());
        let error = sources(dir.path(), &[mount("data"), mount("/nowhere")]).unwrap_err();
        assert_eq!(error.field, "/mounts/1/source");
    }
}
