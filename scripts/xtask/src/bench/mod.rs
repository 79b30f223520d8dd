//! `scripts/bench`: what hostd costs, beside its peers. Nothing here passes or fails: times of a
//! machine that others use too are for a person to judge.

mod hostd;
mod measure;
mod oci;
mod order;
mod place;
mod program;
mod statistics;
mod vmm;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Measures hostd beside its peers
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Hostd(hostd::Arguments),
    Oci(oci::Arguments),
    Vmm(vmm::Arguments),
}

pub(crate) fn bench(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        What::Hostd(arguments) => hostd::bench(arguments),
        What::Oci(arguments) => oci::bench(arguments),
        What::Vmm(arguments) => vmm::bench(arguments),
    }
}
