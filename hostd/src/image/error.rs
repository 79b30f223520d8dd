//! What can go wrong in the image store, and whose fault it is.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// Why an operation of the image store failed. Nothing of the failed operation is left behind.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No image of the store has this name or digest.
    #[error("there is no image `{reference}`")]
    NotFound { reference: String },
    /// The caller's text is not an image reference.
    #[error("`{reference}` is not an image reference: {reason}")]
    InvalidReference { reference: String, reason: String },
    /// The archive or index holds several images and the caller named none of them.
    #[error("{} holds several images: {}", path.display(), choices.join(", "))]
    Ambiguous { path: PathBuf, choices: Vec<String> },
    /// The archive or layout gives its image no name, and neither did the caller.
    #[error("the image in {} has no name", path.display())]
    NoName { path: PathBuf },
    /// Content is not what its name says: it was corrupted, or the registry lies.
    #[error("content has the digest {actual} where {expected} was expected")]
    DigestMismatch { expected: String, actual: String },
    /// Content is longer or shorter than its descriptor says.
    #[error("{digest} is {problem} than the {expected} bytes that its descriptor gives")]
    SizeMismatch {
        digest: String,
        expected: u64,
        problem: &'static str,
    },
    /// A layer asks for something that no layer may.
    #[error("layer {layer}: the entry `{entry}` is refused: {reason}")]
    Refused {
        layer: String,
        entry: String,
        reason: String,
    },
    /// A layer is not a readable archive.
    #[error("layer {layer} is not a valid archive")]
    BadLayer { layer: String, source: io::Error },
    /// A manifest, index, configuration or archive is malformed or beyond a bound.
    #[error("{what} is not valid: {reason}")]
    Malformed { what: String, reason: String },
    /// The content is of a kind that hostd does not run, e.g. a Helm chart.
    #[error("{what} has the media type `{media_type}`, which is not supported")]
    UnsupportedMediaType { what: String, media_type: String },
    /// The image exists, but not for this machine.
    #[error("`{reference}` has no image for {wanted}; it is for {offered}")]
    NoPlatform {
        reference: String,
        wanted: String,
        offered: String,
    },
    /// The registry answered with an error.
    #[error("the registry answered {status} to {url}: {message}")]
    Registry {
        status: u16,
        url: String,
        message: String,
    },
    /// The registry could not be talked to.
    #[error("could not reach {url}")]
    Unreachable { url: String, source: reqwest::Error },
    /// HTTPS could not be set up on this host.
    #[error("HTTPS cannot be used on this host")]
    Tls { source: reqwest::Error },
    /// The file system is full, or its quota is.
    #[error("no space is left for images in {}", path.display())]
    NoSpace { path: PathBuf },
    /// A program that is needed is not installed.
    #[error("`{program}` is not installed")]
    ToolMissing {
        program: &'static str,
        package: &'static str,
    },
    /// A program that was run has failed.
    #[error("`{program}` failed ({status}): {output}")]
    ToolFailed {
        program: &'static str,
        status: String,
        output: String,
    },
    /// Another process has the store open.
    #[error("the image store {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    /// The caller went away while work was being done for it.
    #[error("the operation was cancelled")]
    Cancelled,
    /// The host refused an operation on a file.
    #[error("could not {action} {}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl ImageError {
    /// What a person can do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "most errors say it all themselves"
        )]
        match self {
            Self::NotFound { reference } => Some(format!(
                "`hostctl image list` shows what there is; `hostctl image pull {reference}` fetches it"
            )),
            Self::Ambiguous { .. } => Some("give the reference of one of them".to_owned()),
            Self::NoName { .. } => Some("give the reference that it is to have".to_owned()),
            Self::DigestMismatch { .. } | Self::SizeMismatch { .. } => {
                Some("pull or import it again; if it fails again, the source is damaged".to_owned())
            }
            Self::NoSpace { .. } => Some(
                "remove images that are not needed with `hostctl image rm`, or add disk space"
                    .to_owned(),
            ),
            Self::ToolMissing { package, .. } => Some(format!("`apt-get install {package}`")),
            Self::Tls { .. } => Some("`apt-get install ca-certificates`".to_owned()),
            Self::Registry {
                status: 401 | 403, ..
            } => Some(
                "check the name; if the repository is private, put credentials into \
                 ~/.docker/config.json of the user that hostd runs as"
                    .to_owned(),
            ),
            Self::Unreachable { .. } => Some(
                "check the name, and the host's network; `hostctl image list` shows what is here"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// For `map_err`: an operation on a file of the store, or the lack of space that it met.
    pub(super) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => Self::NoSpace { path },
            _ => Self::Io {
                action,
                path,
                source,
            },
        }
    }

    #[expect(
        clippy::needless_pass_by_value,
        reason = "errors and texts are at hand as values"
    )]
    pub(super) fn malformed(what: impl Into<String>, reason: impl ToString) -> Self {
        Self::Malformed {
            what: what.into(),
            reason: reason.to_string(),
        }
    }
}
