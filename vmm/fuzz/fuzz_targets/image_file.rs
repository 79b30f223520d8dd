//! virtio-blk on an image file that somebody hostile has made. What the file says about itself may be an
//! error of its opening, or of requests; nothing else.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Once, OnceLock};

use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm::containment::is_contained;
use vmm::spec::DiskFormat;
use vmm::virtio::block::{Block, BlockOptions, Layer};
use vmm_fuzz::{Script, run};

/// The unit in which images are laid out. Those of the fuzzer are small, to have more tables in fewer bytes.
const CLUSTER_BYTES: usize = 512;
/// More bytes than the header and the first tables have.
const CLUSTERS: u16 = 64;

/// Other bytes at a place of a good image: a number of the header, an entry of a table.
#[derive(Arbitrary, Debug)]
struct Edit {
    cluster: u16,
    at: u16,
    bytes: [u8; 8],
    length: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    edits: Vec<Edit>,
    script: Script,
}

/// An image of a disk of 1 MiB, some of which has been written.
fn good() -> std::io::Result<Vec<u8>> {
    let file = tempfile::tempfile()?;
    let options = || StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(file.try_clone()?, options())?;
    let builder = Qcow2::<imago::file::File>::create_builder(storage);
    builder.size(1 << 20).cluster_size(CLUSTER_BYTES).create()?;
    let storage = imago::file::File::from_open_file(file.try_clone()?, options())?;
    let image = Qcow2::<imago::file::File>::builder(storage).write(true);
    let image = FormatAccess::new(image.open(DenyImplicitOpenGate::default())?);
    for position in [0, 4096, 512 << 10] {
        image.write(&[0x5a_u8; CLUSTER_BYTES][..], position)?;
    }
    image.flush()?;
    let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).expect("it is small")];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn file(edits: &[Edit]) -> std::io::Result<File> {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    let mut bytes = GOOD
        .get_or_init(|| good().expect("an image can be made"))
        .clone();
    for edit in edits {
        let at = usize::from(edit.cluster % CLUSTERS) * CLUSTER_BYTES
            + usize::from(edit.at) % CLUSTER_BYTES;
        let length = usize::from(edit.length) % (edit.bytes.len() + 1);
        for (place, byte) in bytes.iter_mut().skip(at).zip(&edit.bytes[..length]) {
            *place = *byte;
        }
    }
    let file = tempfile::tempfile()?;
    file.write_all_at(&bytes, 0)?;
    Ok(file)
}

/// The fuzzer ends at every panic; those that become errors are none of its business.
fn let_errors_be() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let fuzzers = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !is_contained() {
                fuzzers(panic);
            }
        }));
    });
}

fuzz_target!(|input: Input| {
    let_errors_be();
    let top = Layer {
        file: file(&input.edits).expect("a file can be made"),
        format: DiskFormat::Qcow2,
    };
    if let Ok(mut block) = Block::open(top, Vec::new(), BlockOptions::default()) {
        run(&mut block, input.script);
    }
});
