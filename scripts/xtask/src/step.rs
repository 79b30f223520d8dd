//! Long work with a name: a line when it starts, how long it took, and its output only if it fails.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write};
use std::process::{Command, Stdio};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// A failed command's output is cut to so many bytes, from its end, where the reason is.
const OUTPUT_BYTES_MAX: usize = 8 * 1024;

/// Runs `work` under a line that says what is going on, on standard error.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let spinner = spinner(what);
    let result = work().with_context(|| format!("{what} failed"));
    spinner.finish_and_clear();
    let mark = if result.is_ok() { "✓" } else { "✗" };
    let seconds = started.elapsed().as_secs_f64();
    // A closed standard error is no reason to stop working.
    let _ = writeln!(std::io::stderr(), "{mark} {what} ({seconds:.1} s)");
    result
}

fn spinner(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")
        .expect("the template is a constant and valid");
    let bar = ProgressBar::new_spinner()
        .with_style(style)
        .with_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Waits for all of them to end; the first failure is the result.
pub(crate) fn join<'scope>(
    workers: impl IntoIterator<Item = ScopedJoinHandle<'scope, Result<()>>>,
) -> Result<()> {
    let join = |worker: ScopedJoinHandle<'scope, _>| worker.join().expect("it does not panic");
    let results: Vec<Result<()>> = workers.into_iter().map(join).collect();
    results.into_iter().collect()
}

/// Runs a command to its end and returns its standard output. A failure carries what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot run {}", name(command)))?;
    if !output.status.success() {
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        let mut start = text.len().saturating_sub(OUTPUT_BYTES_MAX);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        bail!(
            "{} ended with {}:\n{}",
            name(command),
            output.status,
            text[start..].trim_end()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} printed something that is not UTF-8", name(command)))
}

/// A command with its arguments, ready for [`run`].
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}
