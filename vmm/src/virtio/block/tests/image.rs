//! Disks on images, made by the same crate that reads them; see the end for those of others.

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use imago::storage::StorageOpenOptions;

use super::*;

type Storage = imago::file::File;

/// The file of an empty image of this size, perhaps with a name of another in it.
pub(super) fn qcow2(bytes: u64, backing: Option<&str>) -> File {
    let file = tempfile().unwrap();
    let storage = Storage::from_open_file(
        file.try_clone().unwrap(),
        StorageOpenOptions::new().write(true),
    );
    let builder = Qcow2::<Storage>::create_builder(storage.unwrap()).size(bytes);
    match backing {
        Some(name) => builder.backing(name.to_owned(), "raw".to_owned()),
        None => builder,
    }
    .create()
    .unwrap();
    file
}

fn layer(file: &File, format: DiskFormat) -> Layer {
    Layer {
        file: file.try_clone().unwrap(),
        format,
    }
}

fn open(top: &File, backing: Vec<Layer>) -> Result<Block, BlockError> {
    let top = layer(top, DiskFormat::Qcow2);
    Block::open(top, backing, BlockOptions::default())
}

pub(super) fn bench(file: File, backing: Vec<Layer>) -> Bench {
    let mut block = open(&file, backing).unwrap();
    let driver = Driver::start(&mut block);
    Bench {
        block,
        driver,
        file,
    }
}

impl Bench {
    pub(super) fn sectors(&mut self, sector: u64, count: u32) -> Vec<u8> {
        let data = self.driver.writable(512 * count);
        let whole = 512 * count + 1;
        assert_eq!(self.request(READ, sector, &[data]), (OK, whole));
        self.driver.read(data.address, 512 * count as usize)
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) {
        let data = self.driver.readable(bytes);
        assert_eq!(self.request(WRITE, sector, &[data]), (OK, 1));
    }
}

#[test]
fn what_is_written_is_read_and_the_rest_is_zero() {
    let mut bench = bench(qcow2(BYTES, None), Vec::new());
    assert_eq!(bench.block.config()[..8], SECTORS.to_le_bytes());
    assert_eq!(bench.sectors(0, 8), [0; 4096]);
    // More than is moved at a time, across clusters, not at their borders.
    let bytes: Vec<u8> = (0..600 * 512_u32)
        .map(|at| (at / 512 % 251) as u8 + 1)
        .collect();
    bench.write(99, &bytes);
    assert_eq!(bench.sectors(98, 602)[512..601 * 512], bytes);
    assert_eq!(bench.sectors(98, 1), [0; 512]);
    assert_eq!(bench.sectors(699, 1), [0; 512]);
    assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
    // The image as it is now, while the disk still has it open.
    let mut copy = self::bench(bench.file.try_clone().unwrap(), Vec::new());
    assert_eq!(copy.sectors(99, 600), bytes);
    let data = bench.driver.writable(1024);
    assert_eq!(bench.request(READ, SECTORS - 1, &[data]), (FAILED, 1));
}

#[test]
fn a_driver_that_does_not_flush_gets_stable_writes_of_the_tables_too() {
    let file = qcow2(BYTES, None);
    let mut block = open(&file, Vec::new()).unwrap();
    let driver = Driver::start_with(&mut block, 0);
    let mut bench = Bench {
        block,
        driver,
        file,
    };
    bench.write(7, &[5; 512]);
    let mut copy = self::bench(bench.file.try_clone().unwrap(), Vec::new());
    assert_eq!(copy.sectors(7, 1), [5; 512]);
}

#[test]
fn discarded_ranges_give_their_space_back() {
    for (request, flags, frees) in [
        (DISCARD, 0, true),
        (WRITE_ZEROES, 1, true),
        (WRITE_ZEROES, 0, false),
    ] {
        let mut bench = bench(qcow2(BYTES, None), Vec::new());
        bench.write(0, &[7; 2048 * 512]);
        assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
        let before = bench.file.metadata().unwrap().blocks();
        let data = bench.driver.readable(&range(100, 1800, flags));
        assert_eq!(bench.request(request, 0, &[data]), (OK, 1));
        assert_eq!(bench.sectors(99, 1), [7; 512]);
        assert_eq!(bench.sectors(100, 1800), [0; 1800 * 512]);
        assert_eq!(bench.sectors(1900, 1), [7; 512]);
        assert_eq!(bench.request(FLUSH, 0, &[]), (OK, 1));
        let after = bench.file.metadata().unwrap().blocks();
        // Clusters of 64 KiB, of which those at both ends stay.
        assert_eq!(
            frees,
            after + 1536 <= before,
            "{request} {flags}: {before}, {after}"
        );
    }
}

#[test]
fn an_image_is_opened_with_those_that_it_refers_to_and_changes_none_of_them() {
    let (bottom, middle, top) = (
        tempfile().unwrap(),
        qcow2(BYTES, Some("x")),
        qcow2(BYTES, Some("y")),
    );
    bottom.write_all_at(&pattern(), 0).unwrap();
    let raw = || layer(&bottom, DiskFormat::Raw);
    bench(middle.try_clone().unwrap(), vec![raw()]).write(5, &[1; 512]);
    let below = || vec![layer(&middle, DiskFormat::Qcow2), raw()];
    let mut bench = bench(top, below());
    assert_eq!(bench.sectors(4, 1), sectors_of(4, 1));
    assert_eq!(bench.sectors(5, 1), [1; 512]);
    bench.write(4, &[2; 1024]);
    assert_eq!(bench.sectors(3, 1), sectors_of(3, 1));
    assert_eq!(bench.sectors(4, 2), [2; 1024]);
    let mut middle = self::bench(middle.try_clone().unwrap(), vec![raw()]);
    assert_eq!(middle.sectors(5, 1), [1; 512]);
    let mut bytes = vec![0; usize::try_from(BYTES).unwrap()];
    bottom.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, pattern());
}

#[test]
fn what_an_image_says_of_files_is_not_believed() {
    let raw = tempfile().unwrap();
    raw.set_len(BYTES).unwrap();
    let below = || vec![layer(&raw, DiskFormat::Raw)];
    for (case, result) in [
        (
            "another file",
            open(&qcow2(BYTES, Some("/etc/passwd")), Vec::new()),
        ),
        ("no other file", open(&qcow2(BYTES, None), below())),
        ("no image", open(&raw, Vec::new())),
    ] {
        assert!(
            matches!(result, Err(BlockError::Image(_))),
            "{case}: {result:?}"
        );
    }
    // What is named as raw is raw, whatever it holds.
    let image = qcow2(BYTES, Some("/etc/passwd"));
    let length = image.metadata().unwrap().len();
    let top = layer(&image, DiskFormat::Raw);
    let block = Block::open(top, Vec::new(), BlockOptions::default()).unwrap();
    assert_eq!(block.config()[..8], (length / 512).to_le_bytes());
}

#[test]
fn a_read_only_image_is_not_changed() {
    let file = qcow2(BYTES, None);
    let options = BlockOptions {
        read_only: true,
        ..BlockOptions::default()
    };
    let mut block = Block::open(layer(&file, DiskFormat::Qcow2), Vec::new(), options).unwrap();
    let driver = Driver::start(&mut block);
    let mut bench = Bench {
        block,
        driver,
        file,
    };
    let data = bench.driver.readable(&[1; 512]);
    assert_eq!(bench.request(WRITE, 0, &[data]), (FAILED, 1));
    assert_eq!(bench.sectors(0, 1), [0; 512]);
}

#[test]
fn hostile_drivers_are_survived() {
    assert_tricks_are_the_guests_error(&mut open(&qcow2(BYTES, None), Vec::new()).unwrap());
}

proptest! {
    #![proptest_config(noise_config())]

    #[test]
    fn noise_is_survived(noise in any_noise(1)) {
        assert_noise_is_survived(&mut open(&qcow2(BYTES, None), Vec::new()).unwrap(), &noise);
    }
}

/// This one has a table of names of features that is shorter than a name (qcow2, "Feature name table").
#[test]
fn an_image_that_the_crate_panics_at_is_an_error() {
    const EXTENSIONS: u64 = 104;
    let file = qcow2(1 << 20, None);
    let extension = [0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 1, 0];
    file.write_all_at(&extension, EXTENSIONS).unwrap();
    let refused = open(&file, Vec::new()).unwrap_err();
    let message = crate::exit::chain(&refused);
    assert!(message.contains("the image makes no sense"), "{message}");
}
