//! Pulls and imports, with a bar for each blob where somebody watches.

use std::collections::HashMap;
use std::time::Duration;

use hyper::http::Method;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::Context;
use super::client::NDJSON;
use super::error::CliError;
use crate::api::types::{Image, TransferEvent};

/// As much of a digest as a person needs to tell blobs apart.
const DIGEST_CHARS: usize = 12;

const TICK: Duration = Duration::from_millis(100);

/// Asks hostd for a transfer and shows how it goes until it is done.
pub(super) async fn transfer(
    context: &Context,
    path: &str,
    request: &impl Serialize,
) -> Result<Image, CliError> {
    let mut lines = context
        .client
        .lines(Method::POST, path, NDJSON, Some(request))
        .await?;
    // Bars go to standard error, and only if that is a terminal.
    let mut bars = Bars::default();
    while let Some(event) = lines.next_json().await? {
        match event {
            TransferEvent::Progress {
                digest,
                done_bytes,
                total_bytes,
            } => {
                bars.progress(&digest, done_bytes, total_bytes);
            }
            TransferEvent::Unpacking { digest } => bars.unpacking(&digest),
            TransferEvent::Done(image) => {
                bars.clear();
                return Ok(image);
            }
            TransferEvent::Failed(problem) => {
                bars.clear();
                return Err(problem.into());
            }
        }
    }
    bars.clear();
    Err(CliError::Command {
        code: 125,
        message: "hostd ended the transfer half-way".into(),
    })
}

#[derive(Debug, Default)]
struct Bars {
    all: MultiProgress,
    by_digest: HashMap<String, ProgressBar>,
}

impl Bars {
    fn bar(&mut self, digest: &str) -> &ProgressBar {
        let all = &self.all;
        self.by_digest.entry(digest.to_owned()).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(0));
            bar.set_prefix(short_digest(digest).to_owned());
            bar
        })
    }

    fn progress(&mut self, digest: &str, done_bytes: u64, total_bytes: u64) {
        let bar = self.bar(digest);
        if bar.length() != Some(total_bytes) {
            let style =
                style("{prefix} [{bar:30}] {binary_bytes:>10} of {binary_total_bytes} {msg}");
            bar.set_style(style.progress_chars("=> "));
            bar.set_length(total_bytes);
        }
        bar.set_position(done_bytes);
        if done_bytes >= total_bytes {
            bar.set_message("complete");
        }
    }

    fn unpacking(&mut self, digest: &str) {
        let bar = self.bar(digest);
        bar.set_style(style("{prefix} {spinner} {msg}"));
        bar.set_message("unpacking");
        bar.enable_steady_tick(TICK);
    }

    fn clear(&self) {
        // A terminal that cannot be cleared is left as it is.
        let _ = self.all.clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The start of a digest's hash.
pub(super) fn short_digest(digest: &str) -> &str {
    let hash = digest.rsplit(':').next().unwrap_or(digest);
    hash.get(..DIGEST_CHARS).unwrap_or(hash)
}
