//! The list of what is measured, with the goal of each, and how one measurement is made.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::console::{self, Run};
use super::machine::{Devices, MEMORY_MIB, Monitor};
use super::place::Place;
use super::snapshot::{self, Step};

/// The measurement that is made twice, of which the second counts.
const TOUCH: &str = "touch:";

/// One line of the table.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// The most that the figure is to be, if there is a goal.
    pub(crate) goal: Option<f64>,
    how: How,
}

/// One figure and the processor time behind it, in the row's unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) value: f64,
    /// Absent where the figure is not a time.
    pub(crate) cpu: Option<f64>,
}

#[derive(Debug)]
enum How {
    /// Until the guest's first instruction.
    Start,
    /// Until the guest has reset the machine and the process is gone.
    Process,
    /// The memory that is not the guest's: all of it, or what of it is private and changed.
    Memory { dirty: bool },
    /// A step in the life of a machine with this many MiB that is saved and goes on.
    Snapshot(u64, Step),
    /// What the guest counts for one `bench=` word.
    Guest(Devices, &'static str),
}

const fn guest(name: &'static str, goal: Option<f64>, devices: Devices, word: &'static str) -> Row {
    Row {
        name,
        unit: "us",
        goal,
        how: How::Guest(devices, word),
    }
}

const fn row(name: &'static str, unit: &'static str, goal: Option<f64>, how: How) -> Row {
    Row {
        name,
        unit,
        goal,
        how,
    }
}

/// Everything.
pub(crate) const ROWS: &[Row] = &[
    row("first guest instruction", "ms", Some(1.5), How::Start),
    row("start to exit", "ms", Some(5.0), How::Process),
    row(
        "resident memory",
        "MiB",
        Some(2.5),
        How::Memory { dirty: false },
    ),
    row("private memory", "MiB", None, How::Memory { dirty: true }),
    row(
        "restore, 128 MiB",
        "ms",
        Some(2.5),
        How::Snapshot(MEMORY_MIB, Step::Restore),
    ),
    row(
        "restore, 4 GiB",
        "ms",
        Some(2.5),
        How::Snapshot(4096, Step::Restore),
    ),
    row(
        "pause and full snapshot",
        "ms",
        Some(50.0),
        How::Snapshot(MEMORY_MIB, Step::Full),
    ),
    row(
        "pause and diff snapshot",
        "ms",
        Some(10.0),
        How::Snapshot(MEMORY_MIB, Step::Diff),
    ),
    guest(
        "first touch of a page",
        Some(1.0),
        Devices::None,
        "touch:20000",
    ),
    guest("write to an unused port", None, Devices::None, "port:5000"),
    guest(
        "read of a device register",
        None,
        Devices::Disk,
        "mmio:5000",
    ),
    guest(
        "random read 4K, depth 1",
        Some(25.0),
        Devices::Disk,
        "block:random-read:4096:1:10000",
    ),
    guest(
        "random read 4K, depth 32",
        Some(2.0),
        Devices::Disk,
        "block:random-read:4096:32:100000",
    ),
    guest(
        "random write 4K, depth 1",
        None,
        Devices::Disk,
        "block:random-write:4096:1:10000",
    ),
    guest(
        "random write 4K, depth 32",
        Some(3.0),
        Devices::Disk,
        "block:random-write:4096:32:100000",
    ),
    guest(
        "sequential read 128K, depth 32",
        Some(28.0),
        Devices::Disk,
        "block:read:131072:32:4000",
    ),
    guest(
        "sequential write 128K, depth 32",
        Some(36.0),
        Devices::Disk,
        "block:write:131072:32:4000",
    ),
    guest(
        "send 1500-byte frame, depth 32",
        Some(1.1),
        Devices::Net,
        "net:1500:32:200000",
    ),
];

impl Row {
    /// Makes one measurement; none if this monitor cannot be asked for the figure.
    pub(crate) fn measure(
        &self,
        monitor: &Monitor,
        place: &Place,
        ticks_per_microsecond: f64,
    ) -> Result<Option<Sample>> {
        match &self.how {
            How::Start => {
                let run = console::run(&mut monitor.command(place, Devices::None, "")?)?;
                Ok(first_instruction(&run))
            }
            How::Process => {
                let run = console::run(&mut monitor.command(place, Devices::None, "")?)?;
                Ok(Some(Sample {
                    value: run.wall.as_secs_f64() * 1e3,
                    cpu: Some(run.cpu.as_secs_f64() * 1e3),
                }))
            }
            How::Memory { dirty } => {
                let mut command = monitor.command(place, Devices::None, "bench=hold")?;
                let [resident, changed] = console::memory(&mut command)?;
                let bytes = if *dirty { changed } else { resident };
                Ok(Some(Sample {
                    value: to_f64(bytes) / to_f64(1 << 20),
                    cpu: None,
                }))
            }
            How::Snapshot(memory_mib, step) => {
                snapshot::measure(monitor, place, *memory_mib, *step)
            }
            How::Guest(devices, word) => {
                let words = format!("bench={word}");
                if word.starts_with(TOUCH) {
                    // The first machine leaves the host with free memory at hand and in large pieces,
                    // which it may have had to get from its own hypervisor, one page at a time.
                    console::run(&mut monitor.command(place, *devices, &words)?)?;
                }
                let run = console::run(&mut monitor.command(place, *devices, &words)?)?;
                let [count, ticks] = counted(&run.output, word)?;
                Ok(Some(Sample {
                    value: ticks / ticks_per_microsecond / count,
                    cpu: Some(run.cpu.as_secs_f64() * 1e6 / count),
                }))
            }
        }
    }
}

/// The guest's line about `word`: how many, and how many ticks they took.
fn counted(output: &str, word: &str) -> Result<[f64; 2]> {
    let rest = output
        .lines()
        .find_map(|line| line.trim().strip_prefix(word))
        .with_context(|| format!("The guest did not finish {word}; the machine said:\n{output}"))?;
    let mut numbers = rest.split_whitespace().map(str::parse::<u64>);
    match [numbers.next(), numbers.next()] {
        [Some(Ok(count)), Some(Ok(ticks))] if count > 0 => Ok([to_f64(count), to_f64(ticks)]),
        _ => bail!("The guest could not do {word}:{rest}"),
    }
}

/// What `--boot-timer` says: ours by the host's clock and so from before the process was started,
/// Firecracker's from when it begins to build the machine.
pub(super) fn first_instruction(run: &Run) -> Option<Sample> {
    let ours = run.output.lines().find_map(|line| {
        let report: Value = serde_json::from_str(line).ok()?;
        let at = report["boot_at_us"].as_f64()?;
        Some(Sample {
            value: at / 1e3 - run.started.as_secs_f64() * 1e3,
            cpu: Some(report["boot_cpu_us"].as_f64()? / 1e3),
        })
    });
    ours.or_else(|| {
        let (_, rest) = run.output.split_once("Guest-boot-time =")?;
        let mut numbers = rest
            .split_whitespace()
            .filter_map(|word| word.parse::<f64>().ok());
        let (wall, _) = (numbers.next()?, numbers.next()?);
        Some(Sample {
            value: wall / 1e3,
            cpu: Some(numbers.next()? / 1e3),
        })
    })
}

#[expect(clippy::cast_precision_loss, reason = "52 bits are plenty")]
fn to_f64(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_guests_figures_are_found_among_what_firmware_says() {
        let output = "Booting from ROM..port:1000 9 9\nport:1000 1000 52000\nport:5 error x\n";
        assert_eq!(counted(output, "port:1000").unwrap(), [1000.0, 52000.0]);
        counted(output, "port:5").unwrap_err();
        counted(output, "port:7").unwrap_err();
    }

    #[test]
    fn both_kinds_of_boot_timers_are_understood() {
        let run = |output: &str| Run {
            wall: Duration::ZERO,
            cpu: Duration::ZERO,
            started: Duration::from_millis(5),
            output: output.to_owned(),
        };
        let ours = run("{\"boot_wall_us\":900,\"boot_cpu_us\":800,\"boot_at_us\":6500}\n");
        let theirs = run("x Guest-boot-time =   8200 us 8 ms,   1500 CPU us 1 CPU ms\n");
        for (run, value, cpu) in [(ours, 1.5, 0.8), (theirs, 8.2, 1.5)] {
            let sample = first_instruction(&run).unwrap();
            assert!((sample.value - value).abs() < 1e-9);
            assert!((sample.cpu.unwrap() - cpu).abs() < 1e-9);
        }
        assert!(first_instruction(&run("")).is_none());
    }
}
