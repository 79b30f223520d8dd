//! How hostd-vmm is linked.
//!
//! Half of the time until a guest's first instruction the program is about to be mapped, page by page, by a kernel
//! that maps 64 KiB around each place that is used. So the functions of a start lie side by side, in their
//! order (`functions.order`, made by `scripts/bench vmm --order`; names in it that are not there do no harm).
//! The linker is LLVM's, which is the one that Rust brings along for this target.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=functions.order");
    for argument in [
        &format!("--symbol-ordering-file={directory}/functions.order"),
        "--no-warn-symbol-ordering",
    ] {
        println!("cargo::rustc-link-arg-bin=hostd-vmm=-Wl,{argument}");
    }
}
