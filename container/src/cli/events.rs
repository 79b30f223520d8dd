//! `events`.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use container::verbs::events::Events;
use jiff::SignedDuration;

use super::{Global, print};

#[derive(Args, Debug)]
pub(super) struct Show {
    /// Show once what the container uses
    #[arg(long)]
    stats: bool,
    /// Time between two looks, as 500ms or 1m30s
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_interval)]
    interval: Duration,
    /// Name of the container
    id: String,
}

impl Show {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let events = Events::open(&global.root, &self.id)?;
        if self.stats {
            print(&format!("{}\n", serde_json::to_string(&events.stats()?)?))?;
            return Ok(0);
        }
        let mut stdout = io::stdout().lock();
        events.follow(self.interval, |event| {
            writeln!(stdout, "{}", serde_json::to_string(event)?)?;
            stdout.flush()
        })?;
        Ok(0)
    }
}

/// A duration of more than nothing.
fn parse_interval(text: &str) -> Result<Duration> {
    let duration: SignedDuration = text.parse().context("as 500ms or 1m30s")?;
    ensure!(duration.is_positive(), "it must be more than 0");
    Ok(duration.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_has_a_unit() {
        assert_eq!(parse_interval("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(parse_interval("100ms").unwrap(), Duration::from_millis(100));
        assert_eq!(parse_interval("1m30s").unwrap(), Duration::from_secs(90));
        for wrong in ["0s", "-1s", "5", ""] {
            parse_interval(wrong).unwrap_err();
        }
    }
}
