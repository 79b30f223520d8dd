//! `hostctl doctor`: what this host can do for instances, and what to do about the rest.

use std::process::ExitCode;

use clap::Args;
use console::style;

use crate::api::types::{Finding, FindingLevel, Host};
use crate::cli::error::CliError;
use crate::cli::{Context, output};

/// Say what this host can do, and what to do about the rest; works without hostd too
#[derive(Args, Debug)]
#[command(
    after_help = "The exit status is 1 if something keeps instances of both kinds from \
                        running."
)]
pub(in crate::cli) struct Arguments {}

pub(in crate::cli) async fn run(
    context: &Context,
    _arguments: Arguments,
) -> Result<ExitCode, CliError> {
    // hostd sees what it will work with; where there is none, we look ourselves.
    let (daemon, findings) = match context.client.get::<Host>("/v1/host").await {
        Ok(host) if !host.findings.is_empty() => (Ok(host.version), host.findings),
        Ok(host) => (Ok(host.version), crate::doctor::findings()),
        Err(error) => (Err(error), crate::doctor::findings()),
    };
    if context.json {
        output::json(&findings)?;
    } else {
        output::line(&report(&findings))?;
        let remark = match daemon {
            Ok(version) => format!("hostd {version} answers."),
            Err(error) => format!("Looked at from here, since {error}."),
        };
        output::line(&format!("\n{remark}"))?;
    }
    let broken = findings
        .iter()
        .any(|finding| finding.level == FindingLevel::Error);
    Ok(ExitCode::from(u8::from(broken)))
}

fn report(findings: &[Finding]) -> String {
    let name_width = findings
        .iter()
        .map(|finding| finding.check.len())
        .max()
        .unwrap_or(0);
    let level_width = "warning".len();
    let indent = " ".repeat(level_width + name_width + 4);
    let mut lines = Vec::new();
    for finding in findings {
        let level = output::level(finding.level);
        let pad = " ".repeat(level_width - console::measure_text_width(&level));
        let check = &finding.check;
        lines.push(format!(
            "{level}{pad}  {check:name_width$}  {}",
            finding.detail
        ));
        if let Some(hint) = &finding.hint {
            lines.push(format!("{indent}{} {hint}", style("hint:").cyan()));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_aligned_and_hints_stand_below_their_finding() {
        let finding = |check: &str, level, hint: Option<&str>| Finding {
            check: check.into(),
            level,
            detail: "So.".into(),
            hint: hint.map(str::to_owned),
        };
        let findings = [
            finding("kvm", FindingLevel::Ok, None),
            finding("cgroup", FindingLevel::Warning, Some("Do.")),
        ];
        assert_eq!(
            console::strip_ansi_codes(&report(&findings)),
            "ok       kvm     So.\nwarning  cgroup  So.\n                 hint: Do."
        );
    }
}
