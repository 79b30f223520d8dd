//! How hostd-oci is linked.
//!
//! What a runtime takes of memory is mostly its own code, of which the kernel maps 64 KiB around each
//! place that is used. So functions that are the same are folded into one, and those that a container's
//! life uses lie side by side, in that order (`functions.order`, made by `scripts/bench oci --order`; names in
//! it that are not there do no harm).
//! It lies where its file says, unlike the other programs: to be put anywhere else, 10000 addresses in it would have
//! to be changed at each start, which is an eighth of what `create`, `start` and `delete` take together. It lives no
//! longer than that and obeys whoever calls it; its monitor, which lives on, hands bytes of the hostile on unread.
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
    // The later ones count.
    for argument in ["-no-pie", "-static"] {
        println!("cargo::rustc-link-arg-bin=hostd-oci={argument}");
    }
}
