//! hostd-oci: an OCI runtime with the command line of runc.

use clap::Parser;
use container::log;

mod cli;
mod entry;

fn main() {
    let arguments = cli::Arguments::parse();
    log::set(arguments.global.log());
    let status = match cli::run(arguments) {
        Ok(status) => status,
        Err(error) => {
            log::error(&format!("{error:#}"));
            1
        }
    };
    std::process::exit(status);
}
