//! `kill`.

use anyhow::{Context, Result};
use clap::Args;
use container::verbs::kill::{KillOptions, kill};
use nix::sys::signal::Signal;

use super::Global;

#[derive(Args, Debug)]
pub(super) struct Kill {
    /// Signal every process of the container
    #[arg(short, long)]
    all: bool,
    /// Name of the container
    id: String,
    /// Name or number of the signal
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

impl Kill {
    pub(super) fn run(self, global: &Global) -> Result<i32> {
        let signal = parse_signal(&self.signal)
            .with_context(|| format!("there is no signal `{}`", self.signal))?;
        kill(&KillOptions {
            root: global.root.clone(),
            id: self.id,
            signal,
            all: self.all,
        })?;
        Ok(0)
    }
}

/// A number, or a name with or without SIG, in any case; also RTMIN+N.
fn parse_signal(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (0..=libc::SIGRTMAX()).contains(&number).then_some(number);
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let number = libc::SIGRTMIN() + offset.trim_start_matches('+').parse().unwrap_or(0);
        return (number <= libc::SIGRTMAX()).then_some(number);
    }
    format!("SIG{name}")
        .parse::<Signal>()
        .ok()
        .map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_has_many_spellings() {
        for (text, number) in [
            ("9", Some(9)),
            ("KILL", Some(9)),
            ("SIGKILL", Some(9)),
            ("sigterm", Some(15)),
            ("RTMIN+3", Some(libc::SIGRTMIN() + 3)),
            ("SIGFLY", None),
            ("65", None),
            ("-1", None),
        ] {
            assert_eq!(parse_signal(text), number, "{text}");
        }
    }
}
