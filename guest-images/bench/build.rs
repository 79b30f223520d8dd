//! Compiles the guest. Cargo itself cannot: a program without the standard library must abort on
//! panics, and how to panic is a setting of all packages at once.

use std::env;
use std::path::Path;
use std::process::Command;

const SOURCES: &str = "src/guest";

fn main() {
    println!("cargo::rerun-if-changed={SOURCES}");
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
    let sources = Path::new(&here).join(SOURCES);
    let kernel = Path::new(&env::var("OUT_DIR").expect("cargo has a place for it")).join("kernel");
    let linker_arguments = format!(
        "link-args=-nostdlib -static -Wl,--build-id=none -Wl,-z,norelro -Wl,-T,{}",
        sources.join("guest.ld").display()
    );
    let mut compiler = Command::new(env::var("RUSTC").expect("cargo names the compiler"));
    compiler
        .args(["--edition=2024", "--crate-name=guest", "--crate-type=bin"])
        .args(["--deny=warnings", "--target=x86_64-unknown-linux-gnu"]);
    for option in [
        "opt-level=3",
        "panic=abort",
        "relocation-model=static",
        "strip=symbols",
        "target-feature=+crt-static",
        &linker_arguments,
    ] {
        compiler.args(["-C", option]);
    }
    let status = compiler
        .arg("-o")
        .arg(kernel)
        .arg(sources.join("main.rs"))
        .status()
        .expect("the compiler can be run");
    assert!(status.success(), "the guest does not compile");
}
