//! virtio-blk on an image against a hostile driver.
#![no_main]

use std::fs::File;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;
use libfuzzer_sys::fuzz_target;
use vmm::spec::DiskFormat;
use vmm::virtio::block::{Block, BlockOptions, Layer};
use vmm_fuzz::{Script, run};

/// An empty disk of 1 MiB.
fn image() -> std::io::Result<File> {
    let file = tempfile::tempfile()?;
    let options = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(file.try_clone()?, options)?;
    let builder = Qcow2::<imago::file::File>::create_builder(storage);
    builder.size(1 << 20).create()?;
    Ok(file)
}

fuzz_target!(|script: Script| {
    let top = Layer {
        file: image().expect("an image can be made"),
        format: DiskFormat::Qcow2,
    };
    let block = Block::open(top, Vec::new(), BlockOptions::default());
    run(&mut block.expect("it is an image"), script);
});
