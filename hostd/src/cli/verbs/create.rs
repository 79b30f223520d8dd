//! `hostctl create`: makes an instance that does not run yet.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::image::IMAGES;
use crate::api::types::{Instance, InstanceSpec, PullRequest};
use crate::cli::error::CliError;
use crate::cli::spec::SpecFlags;
use crate::cli::transfer::transfer;
use crate::cli::{Context, output};

/// When an instance's image is pulled.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum Pull {
    /// If it is not here
    #[default]
    Missing,
    /// Even if it is here
    Always,
    /// Not at all
    Never,
}

/// Make an instance without starting it
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  hostctl create --name web -p 8080:80 nginx\n  hostctl start web"
)]
pub(in crate::cli) struct Arguments {
    /// When to pull the image
    #[arg(long, value_enum, default_value_t)]
    pull: Pull,
    #[command(flatten)]
    spec: SpecFlags,
}

pub(in crate::cli) async fn run(
    context: &Context,
    arguments: Arguments,
) -> Result<ExitCode, CliError> {
    let spec = arguments.spec.into_spec()?;
    let created = create_instance(context, &spec, arguments.pull).await?;
    if context.json {
        output::json(&created)?;
    } else {
        output::line(&created.name)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Creates the instance, and gets its image before if need be.
pub(super) async fn create_instance(
    context: &Context,
    spec: &InstanceSpec,
    pull: Pull,
) -> Result<Instance, CliError> {
    if matches!(pull, Pull::Always) {
        pull_image(context, &spec.image).await?;
    }
    match context.client.post("/v1/instances", Some(spec)).await {
        Err(error) if error.has_code("image_not_found") && matches!(pull, Pull::Missing) => {
            output::remark(&format!(
                "the image `{}` is not here; pulling it",
                spec.image
            ));
            pull_image(context, &spec.image).await?;
            context.client.post("/v1/instances", Some(spec)).await
        }
        created => created,
    }
}

async fn pull_image(context: &Context, reference: &str) -> Result<(), CliError> {
    let request = PullRequest {
        reference: reference.to_owned(),
        insecure: false,
    };
    transfer(context, &format!("{IMAGES}/pull"), &request)
        .await
        .map(drop)
}
