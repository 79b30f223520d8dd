//! `hostctl image`: pull, import, list and rm.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use jiff::Timestamp;

use super::each;
use crate::api::types::{Image, ImportRequest, PullRequest};
use crate::cli::client::escape;
use crate::cli::error::CliError;
use crate::cli::output::Table;
use crate::cli::spec::absolute_path;
use crate::cli::transfer::{short_digest, transfer};
use crate::cli::{Context, output, units};

pub(super) const IMAGES: &str = "/v1/images";

/// Pull, import, list and remove images
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  hostctl image pull docker.io/library/nginx:1\n  \
                        hostctl image import --name app:dev ./layout\n  hostctl image list"
)]
pub(in crate::cli) struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Pull(PullArguments),
    Import(ImportArguments),
    List(ListArguments),
    Rm(RemoveArguments),
}

/// Get an image from a registry
#[derive(Args, Debug)]
struct PullArguments {
    /// Speak plain HTTP; loopback registries are spoken to so anyway
    #[arg(long)]
    insecure: bool,
    /// The image, e.g. docker.io/library/busybox:1
    reference: String,
}

/// Take an image from an OCI layout: a directory, or a tar of one
#[derive(Args, Debug)]
struct ImportArguments {
    /// The name to give it; the layout's own if absent
    #[arg(long, value_name = "REFERENCE")]
    name: Option<String>,
    /// The layout, on the host that hostd runs on
    path: PathBuf,
}

/// List images
#[derive(Args, Debug)]
#[command(visible_alias = "ls")]
struct ListArguments {
    /// Only the references
    #[arg(short, long)]
    quiet: bool,
}

/// Remove images that no instance uses
#[derive(Args, Debug)]
#[command(visible_alias = "remove")]
struct RemoveArguments {
    /// The images, by reference
    #[arg(required = true)]
    references: Vec<String>,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    match arguments.verb {
        Verb::Pull(PullArguments {
            insecure,
            reference,
        }) => {
            let request = PullRequest {
                reference,
                insecure,
            };
            let image = transfer(context, &format!("{IMAGES}/pull"), &request).await?;
            got(context, &image)
        }
        Verb::Import(ImportArguments { name, path }) => {
            let request = ImportRequest {
                path: absolute_path(&path)?,
                reference: name,
            };
            let image = transfer(context, &format!("{IMAGES}/import"), &request).await?;
            got(context, &image)
        }
        Verb::List(arguments) => list(context, &arguments).await,
        Verb::Rm(RemoveArguments { references }) => {
            let act = async |reference: &str| {
                context
                    .client
                    .delete(&format!("{IMAGES}/{}", escape(reference)))
                    .await
            };
            each(&references, act, |reference, ()| {
                if context.json {
                    Ok(())
                } else {
                    output::line(reference)
                }
            })
            .await
        }
    }
}

fn got(context: &Context, image: &Image) -> Result<ExitCode, CliError> {
    if context.json {
        output::json(image)?;
    } else {
        output::line(&format!("{} ({})", image.reference, image.digest))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(context: &Context, arguments: &ListArguments) -> Result<ExitCode, CliError> {
    let images: Vec<Image> = context.client.get(IMAGES).await?;
    if context.json {
        output::json(&images)?;
    } else if arguments.quiet {
        for image in &images {
            output::line(&image.reference)?;
        }
    } else {
        output::line(&table(&images, Timestamp::now()).render())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(images: &[Image], now: Timestamp) -> Table {
    let mut table = Table::new(["REFERENCE", "DIGEST", "SIZE", "ARCHITECTURE", "CREATED"]);
    for image in images {
        table.row([
            image.reference.clone(),
            short_digest(&image.digest).to_owned(),
            units::size(image.size),
            image.architecture.clone(),
            format!("{} ago", units::age(image.created_at, now)),
        ]);
    }
    table
}
