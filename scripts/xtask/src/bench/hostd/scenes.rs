//! What is measured: the same thing done by both engines in turn, again and again.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::Pid;
use serde::Serialize;

use super::engine::{Engine, Hostd, Podman};
use crate::bench::measure::{self, Cost};
use crate::bench::statistics::Summary;
use crate::step::run;

/// Before anything counts, so that programs are in memory and caches are filled.
const WARM_UP_RUNS: u32 = 2;

/// The program of an instance that does nothing.
const IDLE: [&str; 2] = ["sleep", "86400"];

/// A call, or several in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scene {
    pub(super) title: &'static str,
    act: Act,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Run,
    RunWithNetwork,
    StartRemove,
    Exec,
    List,
}

/// Without a network but for the one, which podman needs other packages for.
pub(super) const ALL: &[Scene] = &[
    Scene {
        title: "run --rm of true",
        act: Act::Run,
    },
    Scene {
        title: "run --rm of true, on the bridge",
        act: Act::RunWithNetwork,
    },
    Scene {
        title: "run --detach, rm --force",
        act: Act::StartRemove,
    },
    Scene {
        title: "exec of true in a running instance",
        act: Act::Exec,
    },
    Scene {
        title: "list of one instance",
        act: Act::List,
    },
];

pub(super) const MEMORY: &str = "memory for one more idle instance";

/// What one engine came to.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub(super) engine: &'static str,
    /// Milliseconds, or KiB of memory.
    #[serde(flatten)]
    pub(super) summary: Summary,
}

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) title: &'static str,
    pub(super) unit: &'static str,
    pub(super) results: Vec<Figures>,
}

/// Has both engines do it `runs` times, one after the other in each round.
pub(super) fn play(scene: &Scene, hostd: &Hostd, podman: &Podman, runs: u32) -> Result<Row> {
    let engines: &[&dyn Engine] = match scene.act {
        Act::RunWithNetwork => &[hostd],
        Act::Run | Act::StartRemove | Act::Exec | Act::List => &[hostd, podman],
    };
    let lasting = matches!(scene.act, Act::Exec | Act::List);
    if lasting {
        for engine in engines {
            start(*engine, "lasting")?;
        }
    }
    let mut costs = vec![Vec::new(); engines.len()];
    for round in 0..WARM_UP_RUNS + runs {
        for (engine, costs) in engines.iter().zip(&mut costs) {
            let cost =
                act(scene.act, *engine).with_context(|| format!("{} failed", engine.name()))?;
            if round >= WARM_UP_RUNS {
                costs.push(cost.wall.as_secs_f64() * 1e3);
            }
        }
    }
    if lasting {
        for engine in engines {
            remove(*engine, "lasting")?;
        }
    }
    row(scene.title, "ms", engines, &costs)
}

fn row(
    title: &'static str,
    unit: &'static str,
    engines: &[&dyn Engine],
    values: &[Vec<f64>],
) -> Result<Row> {
    let figures = engines.iter().zip(values).map(|(engine, values)| {
        Ok(Figures {
            engine: engine.name(),
            summary: Summary::of(values).context("Nothing was measured")?,
        })
    });
    Ok(Row {
        title,
        unit,
        results: figures.collect::<Result<_>>()?,
    })
}

fn act(act: Act, engine: &dyn Engine) -> Result<Cost> {
    let once = |options: &[&str]| {
        let mut call = engine.call(&["run", "--rm"]);
        measure::run(call.args(options).args([engine.image(), "true"]))
    };
    match act {
        Act::Run => once(&["--network", "none"]),
        Act::RunWithNetwork => once(&[]),
        Act::StartRemove => {
            let mut cost = measure::run(&mut detached(engine, "brief"))?;
            cost += measure::run(&mut removal(engine, "brief"))?;
            Ok(cost)
        }
        Act::Exec => measure::run(&mut engine.call(&["exec", "lasting", "true"])),
        Act::List => measure::run(&mut engine.list()),
    }
}

fn detached(engine: &dyn Engine, name: &str) -> Command {
    let mut call = engine.call(&["run", "--detach", "--network", "none", "--name", name]);
    call.arg(engine.image()).args(IDLE);
    call
}

fn removal(engine: &dyn Engine, name: &str) -> Command {
    let mut call = engine.call(&["rm", "--force"]);
    if engine.name() == "podman" {
        // As hostctl: no time for a polite end.
        call.args(["--time", "0"]);
    }
    call.arg(name);
    call
}

fn start(engine: &dyn Engine, name: &str) -> Result<()> {
    run(&mut detached(engine, name)).map(|_| ())
}

fn remove(engine: &dyn Engine, name: &str) -> Result<()> {
    run(&mut removal(engine, name)).map(|_| ())
}

/// What the engine's own processes hold more for each instance than the first.
pub(super) fn memory(hostd: &Hostd, podman: &Podman, instances: u32) -> Result<Row> {
    let engines: &[&dyn Engine] = &[hostd, podman];
    let values = engines
        .iter()
        .map(|engine| Ok(vec![memory_of(*engine, instances)?]));
    let values: Vec<Vec<f64>> = values.collect::<Result<_>>()?;
    row(MEMORY, "KiB", engines, &values)
}

fn memory_of(engine: &dyn Engine, instances: u32) -> Result<f64> {
    let names: Vec<String> = (0..=instances)
        .map(|number| format!("idle-{number}"))
        .collect();
    start(engine, &names[0])?;
    let one = proportional_kib(&engine.keepers()?)?;
    for name in &names[1..] {
        start(engine, name)?;
    }
    let all = proportional_kib(&engine.keepers()?)?;
    for name in &names {
        remove(engine, name)?;
    }
    Ok((all - one) / f64::from(instances))
}

/// What processes have in memory; what they share with others counts in part.
fn proportional_kib(processes: &[Pid]) -> Result<f64> {
    let mut sum = 0.0;
    for pid in processes {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        sum += kib
            .context("The kernel does not say how much memory a process has")?
            .parse::<f64>()?;
    }
    Ok(sum)
}
