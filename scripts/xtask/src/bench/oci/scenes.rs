//! What is measured: each thing done by every runtime in turn, again and again.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use serde::Serialize;

use super::bundle::Bundles;
use super::goals::{self, Goal};
use super::runtime::{Background, Runtime};
use crate::bench::measure::{self, Cost, memory, reap};
use crate::bench::statistics::Summary;

/// Before anything counts, so that programs are in memory and caches are filled.
const WARM_UP_RUNS: u32 = 2;
/// Memory hardly varies.
const MEMORY_RUNS: u32 = 5;

/// Something that is measured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scene {
    pub(super) title: &'static str,
    kind: Kind,
    /// None where the goal is about memory.
    pub(super) goal: Option<Goal>,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    RunBare,
    RunPodman,
    CreateStartDelete,
    Exec,
    Memory,
}

/// All scenes, in the order of the report.
pub(super) const ALL: &[Scene] = &[
    Scene {
        title: "run of /bin/true, bare configuration",
        kind: Kind::RunBare,
        goal: Some(goals::RUN_BARE),
    },
    Scene {
        title: "run of /bin/true, podman's configuration",
        kind: Kind::RunPodman,
        goal: Some(goals::RUN_PODMAN),
    },
    Scene {
        title: "create + start + delete",
        kind: Kind::CreateStartDelete,
        goal: Some(goals::CREATE_START_DELETE),
    },
    Scene {
        title: "exec of /bin/true in a running container",
        kind: Kind::Exec,
        goal: Some(goals::EXEC),
    },
    Scene {
        title: "peak memory of run, bare configuration",
        kind: Kind::Memory,
        goal: None,
    },
];

/// What a scene came to: one entry per runtime, in their order.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    #[serde(skip)]
    pub(super) goal: Option<Goal>,
    pub(super) title: &'static str,
    pub(super) results: Vec<Figures>,
}

/// One runtime's figures: times in milliseconds, memory in KiB.
#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figures {
    Time { wall: Summary, processor: Summary },
    Memory(Summary),
}

/// Has every runtime play the scene `runs` times, one after the other in each round.
pub(super) fn play(
    scene: &Scene,
    runtimes: &[Runtime],
    bundles: &Bundles,
    runs: u32,
) -> Result<Row> {
    let results = match scene.kind {
        Kind::Memory => memories(runtimes, bundles)?,
        Kind::Exec => execs(runtimes, bundles, runs)?,
        Kind::RunBare => rounds(runtimes, runs, |runtime, id| {
            run(runtime, &bundles.bare, id)
        })?,
        Kind::RunPodman => rounds(runtimes, runs, |runtime, id| {
            run(runtime, &bundles.podman, id)
        })?,
        Kind::CreateStartDelete => rounds(runtimes, runs, |runtime, id| {
            create_start_delete(runtime, bundles, id)
        })?,
    };
    Ok(Row {
        goal: scene.goal,
        title: scene.title,
        results,
    })
}

/// The rounds of one scene: `act` gets a fresh name each time.
fn rounds(
    runtimes: &[Runtime],
    runs: u32,
    act: impl Fn(&Runtime, &str) -> Result<Cost>,
) -> Result<Vec<Figures>> {
    let mut costs = vec![Vec::new(); runtimes.len()];
    for round in 0..WARM_UP_RUNS + runs {
        for (runtime, costs) in runtimes.iter().zip(&mut costs) {
            let id = format!("bench-{}-{}-{round}", std::process::id(), runtime.name);
            let cost = act(runtime, &id).with_context(|| format!("{} failed", runtime.name))?;
            if round >= WARM_UP_RUNS {
                costs.push(cost);
            }
        }
    }
    costs.iter().map(|costs| time_figures(costs)).collect()
}

fn time_figures(costs: &[Cost]) -> Result<Figures> {
    let summary = |of: fn(&Cost) -> Duration| {
        let milliseconds: Vec<f64> = costs
            .iter()
            .map(|cost| of(cost).as_secs_f64() * 1e3)
            .collect();
        Summary::of(&milliseconds).context("Nothing was measured")
    };
    Ok(Figures::Time {
        wall: summary(|cost| cost.wall)?,
        processor: summary(|cost| cost.processor)?,
    })
}

fn run(runtime: &Runtime, bundle: &Path, id: &str) -> Result<Cost> {
    let mut call = runtime.call(["run", "--bundle"]);
    measure::run(call.arg(bundle).arg(id))
}

/// The three calls of an engine. The wait for the container's end in between does not count, its
/// processor time does.
fn create_start_delete(runtime: &Runtime, bundles: &Bundles, id: &str) -> Result<Cost> {
    let bundle = &bundles.bare;
    let pid_file: PathBuf = bundle.join("pid");
    let mut create = runtime.call(["create", "--bundle"]);
    create.arg(bundle).arg("--pid-file").arg(&pid_file).arg(id);
    let mut cost = measure::run(&mut create)?;
    let pid = fs::read_to_string(&pid_file).context("There is no pid file")?;
    let pid = Pid::from_raw(pid.trim().parse().context("The pid file has no number")?);
    cost += measure::run(&mut runtime.call(["start", id]))?;
    cost.processor += reap(pid)?;
    let status = runtime.status(id)?;
    if status != "stopped" {
        bail!("{id} is {status} after its end");
    }
    cost += measure::run(&mut runtime.call(["delete", id]))?;
    Ok(cost)
}

fn execs(runtimes: &[Runtime], bundles: &Bundles, runs: u32) -> Result<Vec<Figures>> {
    let containers: Vec<Background<'_>> = runtimes
        .iter()
        .map(|runtime| {
            let id = format!("bench-{}-{}", std::process::id(), runtime.name);
            Background::start(runtime, &bundles.lasting, &id)
        })
        .collect::<Result<_>>()?;
    rounds(runtimes, runs, |runtime, _| {
        let container = containers.iter().find(|container| container.is_of(runtime));
        let container = container.context("There is no container to exec in")?;
        measure::run(&mut runtime.call(["exec", &container.id, "/bin/true"]))
    })
}

fn memories(runtimes: &[Runtime], bundles: &Bundles) -> Result<Vec<Figures>> {
    let of = |runtime: &Runtime| {
        let mut values = Vec::new();
        for round in 0..MEMORY_RUNS {
            let id = format!("bench-{}-{}-{round}", std::process::id(), runtime.name);
            let mut call = runtime.call(["run", "--bundle"]);
            call.arg(&bundles.bare).arg(&id);
            // Exact: the figure is far below 2^52.
            #[expect(clippy::cast_precision_loss, reason = "KiB of memory")]
            values.push(memory(&call, &bundles.bare)? as f64);
        }
        let summary = Summary::of(&values).context("Nothing was measured")?;
        Ok(Figures::Memory(summary))
    };
    runtimes.iter().map(of).collect()
}
