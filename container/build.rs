//! How hostd-oci is linked.
//!
//! What a runtime takes of memory is mostly its own code, of which the kernel maps 64 KiB around each
//! place that is used. So functions that are the same are folded into one, and those that a container's
//! life uses lie side by side, in that order (`functions.order`, made by `scripts/bench oci --order`; names in
//! it that are not there do no harm).
//! The linker is LLVM's, which is the one that Rust brings along for this target.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=functions.order");
    for argument in [
        // It begins with the instructions of `entry`.
        "--entry=hostd_oci_entry",
        "--icf=all",
        &format!("--symbol-ordering-file={directory}/functions.order"),
        "--no-warn-symbol-ordering",
    ] {
        println!("cargo::rustc-link-arg-bin=hostd-oci=-Wl,{argument}");
    }
}
