//! What machines are measured with: the guest, a disk whose pages are in the page cache, and a tap
//! in a network namespace where nobody listens. Gone when the place is dropped.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::paths;
use crate::step::{command, run};

/// A quarter of the memory that small machines have.
const DISK_BYTES: usize = 256 << 20;
const BLOCK_BYTES: usize = 4096;

/// The name of the tap.
pub(crate) const TAP: &str = "tap0";

/// A folder and a network namespace.
#[derive(Debug)]
pub(crate) struct Place {
    folder: PathBuf,
    namespace: String,
}

impl Place {
    /// Makes them.
    pub(crate) fn new() -> Result<Place> {
        let name = format!("hostd-bench-{}", std::process::id());
        let place = Place {
            folder: paths::build().join(&name),
            namespace: name,
        };
        fs::create_dir_all(&place.folder).context("Cannot make a folder")?;
        fs::write(place.kernel(), bench_guest::KERNEL).context("Cannot write the guest")?;
        place.fill_disk().context("Cannot write the disk")?;
        place.make_network()?;
        Ok(place)
    }

    /// The guest.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.folder.join("kernel")
    }

    /// The disk.
    pub(crate) fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Where a machine's configuration may be written.
    pub(crate) fn configuration(&self) -> PathBuf {
        self.folder.join("configuration.json")
    }

    /// A path for something else.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// What to put in front of a command so that it finds the tap.
    pub(crate) fn in_network(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.namespace]
    }

    /// Written in full, so that all its blocks are there and all its pages in the cache; in small
    /// pieces, since file systems may keep what is written at once in one large page, of which each
    /// small write then costs more.
    fn fill_disk(&self) -> Result<()> {
        let disk = fs::File::create(self.disk())?;
        let mut random = fs::File::open("/dev/urandom")?;
        let mut block = vec![0; BLOCK_BYTES];
        random.read_exact(&mut block)?;
        for number in 0..DISK_BYTES / BLOCK_BYTES {
            block[..8].copy_from_slice(&number.to_le_bytes());
            (&disk).write_all(&block)?;
        }
        Ok(disk.sync_all()?)
    }

    fn make_network(&self) -> Result<()> {
        run(&mut command("ip", ["netns", "add", &self.namespace]))?;
        let quiet = [
            "sysctl",
            "-qw",
            "net.ipv6.conf.all.disable_ipv6=1",
            "net.ipv6.conf.default.disable_ipv6=1",
        ];
        let tap = ["ip", "tuntap", "add", "dev", TAP, "mode", "tap", "vnet_hdr"];
        let up = ["ip", "link", "set", TAP, "up"];
        for words in [&quiet[..], &tap, &up] {
            let [program, first @ ..] = self.in_network();
            run(command(program, first).args(words))?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What cannot be removed is left for the next `ip netns delete` and `rm -r build`.
        let _ = run(&mut command("ip", ["netns", "delete", &self.namespace]));
        let _ = fs::remove_dir_all(&self.folder);
    }
}
