//! A disk of known content, and a driver for it.

use super::*;

pub(super) const SECTORS: u64 = 4096;
pub(super) const BYTES: u64 = SECTORS * SECTOR_BYTES;

pub(super) const OK: u8 = 0;
pub(super) const FAILED: u8 = 1;
pub(super) const UNSUPPORTED: u8 = 2;
/// No status was written.
pub(super) const UNTOUCHED: u8 = 0xee;

pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Ring,
    Synchronous,
}

pub(super) const ENGINES: [Kind; 2] = [Kind::Ring, Kind::Synchronous];

/// A disk whose every sector holds its own number, and a driver for it.
pub(super) struct Bench {
    pub(super) block: Block,
    pub(super) driver: Driver,
    pub(super) file: File,
}

pub(super) fn pattern() -> Vec<u8> {
    (0..SECTORS)
        .flat_map(|sector| sector.to_le_bytes().repeat(64))
        .collect()
}

pub(super) fn block(kind: Kind, file: &File, options: BlockOptions) -> Block {
    let file = file.try_clone().unwrap();
    match kind {
        Kind::Ring => {
            let block = Block::new(file, options).unwrap();
            assert!(
                block.engine.fd().is_some(),
                "this test needs a host that allows io_uring"
            );
            block
        }
        Kind::Synchronous => Block::with_engine(file, options, Engine::without_ring).unwrap(),
    }
}

impl Bench {
    pub(super) fn new(kind: Kind, options: BlockOptions) -> Bench {
        let file = tempfile().unwrap();
        file.write_all_at(&pattern(), 0).unwrap();
        let mut block = block(kind, &file, options);
        let driver = Driver::start(&mut block);
        Bench {
            block,
            driver,
            file,
        }
    }

    /// The same, with nothing but limits.
    pub(super) fn limited(kind: Kind, limits: DiskLimits) -> Bench {
        let options = BlockOptions {
            limits,
            ..BlockOptions::default()
        };
        Bench::new(kind, options)
    }

    /// Makes a request available: a header, then buffers, then the status, whose buffer is returned.
    pub(super) fn offer(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Buffer {
        let header = self.driver.readable(&header(kind, sector));
        let status = self.driver.writable(1);
        self.driver.write(status.address, &[UNTOUCHED]);
        self.driver.offer(0, &[&[header], data, &[status]].concat());
        status
    }

    /// One request from beginning to end: its status and used length.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let status = self.offer(kind, sector, data);
        let _ = self.driver.kick(&mut self.block, 0).unwrap();
        let used = self.driver.wait_used(&mut self.block, 0, 1);
        assert_eq!(used.len(), 1);
        (self.driver.read(status.address, 1)[0], used[0].1)
    }

    pub(super) fn content(&self, sector: u64, sectors: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(sectors * SECTOR_BYTES).unwrap()];
        self.file
            .read_exact_at(&mut bytes, sector * SECTOR_BYTES)
            .unwrap();
        bytes
    }
}

pub(super) fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

pub(super) fn sectors_of(sector: u64, sectors: u64) -> Vec<u8> {
    let bytes = SECTOR_BYTES as usize;
    pattern()[sector as usize * bytes..(sector + sectors) as usize * bytes].to_vec()
}
