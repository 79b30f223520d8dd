//! Has hostd-oci begin with the instructions of `entry`, and its linker fold functions that are the same:
//! what the program takes of memory is mostly its own code.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bin=hostd-oci=-Wl,--entry=hostd_oci_entry");
    println!("cargo::rustc-link-arg-bin=hostd-oci=-Wl,--icf=all");
}
