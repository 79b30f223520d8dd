//! The command line of hostd. All of it is in `hostd::cli`, where it can be tested.

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    hostd::cli::main(env::args_os())
}
