//! The verbs, one file each, and what several of them share.

pub(super) mod attach;
pub(super) mod console;
pub(super) mod copy;
pub(super) mod create;
pub(super) mod doctor;
pub(super) mod events;
pub(super) mod exec;
pub(super) mod image;
pub(super) mod info;
pub(super) mod inspect;
pub(super) mod kill;
pub(super) mod list;
pub(super) mod logs;
pub(super) mod pause;
pub(super) mod remove;
pub(super) mod restart;
pub(super) mod resume;
pub(super) mod run;
pub(super) mod snapshot;
pub(super) mod start;
pub(super) mod stats;
pub(super) mod stop;
pub(super) mod update;
pub(super) mod version;
pub(super) mod wait;

use std::process::ExitCode;

use futures::{StreamExt, stream};

use super::Context;
use super::client::{EMPTY, instance, with_query};
use super::error::CliError;
use super::output;
use crate::api::types::Instance;

/// Requests under way at a time when a verb is given many names.
const AT_A_TIME: usize = 8;

/// Does `act` for every name, and `show`s each result in the order of the names. One that fails does
/// not keep the others from being tried.
async fn each<T>(
    names: &[String],
    act: impl AsyncFn(&str) -> Result<T, CliError>,
    mut show: impl FnMut(&str, T) -> Result<(), CliError>,
) -> Result<ExitCode, CliError> {
    let mut results = stream::iter(names)
        .map(|name| act(name))
        .buffered(AT_A_TIME);
    let mut failed = 0;
    for name in names {
        match results.next().await {
            Some(Ok(result)) => show(name, result)?,
            Some(Err(error)) if names.len() == 1 => return Err(error),
            Some(Err(error)) => {
                failed += 1;
                output::remark(&error.text());
            }
            None => break,
        }
    }
    if failed == 0 {
        Ok(ExitCode::SUCCESS)
    } else {
        Err(CliError::Several {
            failed,
            all: names.len(),
        })
    }
}

/// Posts a change of state for every name, and prints the names, or the instances as JSON.
async fn change(
    context: &Context,
    names: &[String],
    verb: &str,
    parameters: &[(&str, Option<String>)],
) -> Result<ExitCode, CliError> {
    let act = async |name: &str| {
        let path = with_query(&format!("{}/{verb}", instance(name)), parameters);
        context.client.post::<Instance>(&path, EMPTY).await
    };
    each(names, act, |name, changed| {
        if context.json {
            output::json_line(&changed)
        } else {
            output::line(name)
        }
    })
    .await
}
