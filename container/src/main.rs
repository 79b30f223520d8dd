//! hostd-oci: an OCI runtime with the command line of runc.

use container::error::chain;
use container::log;

mod cli;
mod entry;

fn main() {
    let status = match cli::parse() {
        Ok(arguments) => {
            log::set(arguments.global.log());
            cli::run(arguments).unwrap_or_else(|error| {
                log::error(&chain(error.as_ref()));
                1
            })
        }
        Err(status) => status,
    };
    std::process::exit(status);
}
