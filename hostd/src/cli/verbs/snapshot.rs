//! `hostctl snapshot`: create, list, restore and rm.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::each;
use crate::api::types::{Instance, RestoreRequest, Snapshot, SnapshotRequest};
use crate::cli::client::{escape, instance};
use crate::cli::error::CliError;
use crate::cli::output::Table;
use crate::cli::{Context, output, units};

const EXAMPLES: &str = "\
Examples:
  hostctl snapshot create web before-upgrade
  hostctl snapshot create --stateful box
  hostctl snapshot list web
  hostctl snapshot restore web before-upgrade
  hostctl copy web/before-upgrade web-2
  hostctl snapshot rm web before-upgrade";

/// Keep what an instance is at one moment, and go back to it
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(CreateArguments),
    List(ListArguments),
    Restore(RestoreArguments),
    Rm(RemoveArguments),
}

/// Keep what an instance is now; one that runs stands still for a moment
#[derive(Args, Debug)]
struct CreateArguments {
    /// With its memory, so that a restore goes on where it was (only VMs that run or are paused)
    #[arg(long)]
    stateful: bool,
    /// The instance
    instance: String,
    /// Name of the snapshot; one is chosen if absent
    name: Option<String>,
}

/// List the snapshots of an instance
#[derive(Args, Debug)]
#[command(visible_alias = "ls")]
struct ListArguments {
    /// Only the names
    #[arg(short, long)]
    quiet: bool,
    /// The instance
    instance: String,
}

/// Make an instance what it was; one that runs is killed for that and runs again
#[derive(Args, Debug)]
struct RestoreArguments {
    /// Start it from the files of the snapshot even if that has memory to go on from
    #[arg(long)]
    no_memory: bool,
    /// The instance
    instance: String,
    /// The snapshot
    snapshot: String,
}

/// Remove snapshots; clones keep what they have
#[derive(Args, Debug)]
#[command(visible_alias = "remove")]
struct RemoveArguments {
    /// The instance
    instance: String,
    /// The snapshots
    #[arg(required = true)]
    snapshots: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    match arguments.verb {
        Verb::Create(arguments) => create(context, arguments).await,
        Verb::List(arguments) => list(context, &arguments).await,
        Verb::Restore(arguments) => restore(context, &arguments).await,
        Verb::Rm(RemoveArguments {
            instance,
            snapshots,
        }) => {
            let act = async |name: &str| context.client.delete(&path(&instance, name)).await;
            each(&snapshots, act, |name, ()| {
                if context.json {
                    Ok(())
                } else {
                    output::line(name)
                }
            })
            .await
        }
    }
}

async fn create(context: &Context, arguments: CreateArguments) -> Result<ExitCode, CliError> {
    let request = SnapshotRequest {
        name: arguments.name,
        stateful: arguments.stateful,
    };
    let path = format!("{}/snapshots", instance(&arguments.instance));
    let snapshot: Snapshot = context.client.post(&path, Some(&request)).await?;
    if context.json {
        output::json(&snapshot)?;
    } else {
        output::line(&format!("{}/{}", snapshot.instance, snapshot.name))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(context: &Context, arguments: &ListArguments) -> Result<ExitCode, CliError> {
    let path = format!("{}/snapshots", instance(&arguments.instance));
    let snapshots: Vec<Snapshot> = context.client.get(&path).await?;
    if context.json {
        output::json(&snapshots)?;
    } else if arguments.quiet {
        for snapshot in &snapshots {
            output::line(&snapshot.name)?;
        }
    } else {
        output::line(&table(&snapshots, Timestamp::now()).render())?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn restore(context: &Context, arguments: &RestoreArguments) -> Result<ExitCode, CliError> {
    let request = RestoreRequest {
        stateful: arguments.no_memory.then_some(false),
    };
    let path = format!("{}/restore", path(&arguments.instance, &arguments.snapshot));
    let restored: Instance = context.client.post(&path, Some(&request)).await?;
    if context.json {
        output::json(&restored)?;
    } else {
        output::line(&restored.name)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn path(name: &str, snapshot: &str) -> String {
    format!("{}/snapshots/{}", instance(name), escape(snapshot))
}

fn table(snapshots: &[Snapshot], now: Timestamp) -> Table {
    let mut table = Table::new(["NAME", "CREATED", "MEMORY", "SIZE"]);
    for snapshot in snapshots {
        table.row([
            snapshot.name.clone(),
            format!("{} ago", units::age(snapshot.created_at, now)),
            if snapshot.stateful { "yes" } else { "no" }.to_owned(),
            units::size(snapshot.size_bytes),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use crate::api::types::InstanceSpec;

    use super::*;

    #[test]
    fn the_table_says_how_old_and_how_large_a_snapshot_is_and_what_it_holds() {
        let snapshot = Snapshot {
            instance: "web".into(),
            name: "before".into(),
            created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
            stateful: true,
            size_bytes: 3 << 20,
            image_digest: String::new(),
            spec: InstanceSpec::default(),
        };
        let now = "2026-01-01T01:03:00Z".parse().unwrap();
        let text = table(&[snapshot], now).render();
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row.join(" "), "before 1h 3m ago yes 3 MiB");
    }
}
