//! `hostctl info`: what the host has and gives away.

use std::process::ExitCode;

use clap::Args;

use crate::api::types::{FindingLevel, Host};
use crate::cli::error::CliError;
use crate::cli::{Context, output, units};

/// Show what the host has and gives away
#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {}

pub(in crate::cli) async fn run(
    context: &Context,
    _arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let host: Host = context.client.get("/v1/host").await?;
    if context.json {
        output::json(&host)?;
        return Ok(ExitCode::SUCCESS);
    }
    let count = |level| {
        host.findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    };
    let health = match (count(FindingLevel::Error), count(FindingLevel::Warning)) {
        (0, 0) if host.findings.is_empty() => String::new(),
        (0, 0) => "all well".to_owned(),
        (errors, warnings) => {
            format!("{errors} errors, {warnings} warnings; see `hostctl doctor`")
        }
    };
    output::line(&output::properties(&[
        ("hostd", host.version),
        ("kernel", host.kernel),
        ("processors", host.cpus.to_string()),
        ("memory", units::size(host.memory_bytes)),
        ("memory given", units::size(host.memory_allocated_bytes)),
        ("control groups", host.cgroup),
        ("instances", host.instances.to_string()),
        ("health", health),
    ]))?;
    Ok(ExitCode::SUCCESS)
}
