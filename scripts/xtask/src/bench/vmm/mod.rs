//! `scripts/bench vmm`: hostd-vmm and its peers, in turns, so that what else the machine does at the
//! time meets them all.

mod clock;
mod console;
mod machine;
mod order;
mod place;
mod row;
mod snapshot;
mod table;

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;

use self::machine::Monitor;
use self::place::Place;
use self::row::ROWS;
use self::table::Figures;
use crate::step::step;
use crate::{binaries, packages};

/// Measures hostd-vmm with a bare-metal guest, beside its peers
///
/// Figures are medians of all runs; in brackets the least, and the processor time of the whole
/// process.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Another monitor to measure: firecracker=PATH, qemu=PATH or hostd=PATH. QEMU's microvm if
    /// there is none
    #[arg(long, value_name = "KIND=PATH")]
    peer: Vec<String>,
    /// How often each figure is measured
    #[arg(long, default_value_t = 11)]
    runs: u32,
    /// Only figures whose name contains this
    #[arg(long, value_name = "PART", default_value = "")]
    only: String,
    /// No peers
    #[arg(long, conflicts_with = "peer")]
    alone: bool,
    /// Measure nothing: have the linker put together what is executed (vmm/functions.order)
    #[arg(long, conflicts_with_all = ["peer", "json", "only"])]
    order: bool,
    /// Print JSON with all samples
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    if arguments.order {
        packages::ensure(&["iproute2"])?;
        binaries::build_one("hostd-vmm")?;
        return order::write(&Place::new()?);
    }
    let mut monitors = vec![Monitor::ours()];
    for peer in &arguments.peer {
        monitors.push(Monitor::parse(peer)?);
    }
    if monitors.len() == 1 && !arguments.alone {
        packages::ensure(&["qemu-system-x86", "iproute2"])?;
        monitors.push(Monitor::qemu());
    }
    binaries::build_one("hostd-vmm")?;
    for monitor in &monitors {
        monitor.settle()?;
    }
    let place = Place::new()?;
    let names: Vec<String> = monitors.iter().map(Monitor::to_string).collect();
    let mut all = Vec::new();
    for row in ROWS.iter().filter(|row| row.name.contains(&arguments.only)) {
        all.push(Figures {
            row,
            samples: vec![Vec::new(); monitors.len()],
        });
    }
    for round in 1..=arguments.runs {
        step(&format!("Round {round} of {}", arguments.runs), || {
            measure(&monitors, &place, round, &mut all)
        })?;
    }
    let output = if arguments.json {
        format!("{:#}", table::json(&names, &all))
    } else {
        table::text(&names, &all)
    };
    writeln!(std::io::stdout(), "{output}").context("Cannot print")
}

/// Measures each figure once. Who comes first changes from round to round: the next one finds the
/// host's memory and caches warm.
fn measure(monitors: &[Monitor], place: &Place, round: u32, all: &mut [Figures]) -> Result<()> {
    let ticks = clock::ticks_per_microsecond();
    for figures in all {
        let mut turns: Vec<_> = monitors.iter().zip(&mut figures.samples).collect();
        if round.is_multiple_of(2) {
            turns.reverse();
        }
        for (monitor, samples) in turns {
            let sample = figures
                .row
                .measure(monitor, place, ticks)
                .with_context(|| format!("{monitor}, {}", figures.row.name))?;
            samples.extend(sample);
        }
    }
    Ok(())
}
