//! `hostctl version`: of the client and of the daemon.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use crate::api::types::Host;
use crate::cli::error::CliError;
use crate::cli::{Context, output};

/// Show the versions of hostctl and hostd
#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {}

pub(in crate::cli) async fn run(
    context: &Context,
    _arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let client = env!("CARGO_PKG_VERSION");
    // A client without a daemon has a version all the same.
    let daemon = context
        .client
        .get::<Host>("/v1/host")
        .await
        .ok()
        .map(|host| host.version);
    if context.json {
        output::json(&json!({"hostctl": client, "hostd": daemon}))?;
    } else {
        let daemon = daemon.unwrap_or_else(|| "does not answer".to_owned());
        output::line(&output::properties(&[
            ("hostctl", client.to_owned()),
            ("hostd", daemon),
        ]))?;
    }
    Ok(ExitCode::SUCCESS)
}
