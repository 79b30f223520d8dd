//! Has hostd-oci begin with the instructions of `entry`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bin=hostd-oci=-Wl,--entry=hostd_oci_entry");
}
