//! The data of one file: shared where that can be, copied without its holes elsewhere.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::unistd::{Whence, lseek64};

use super::{Copier, CopyError, STAT_BLOCK_BYTES, check_room};

/// Between two looks at the time.
const PIECE_BYTES: usize = 256 * 1024;

impl Copier {
    /// Gives the empty `target` what `source` holds. `name` is for errors.
    pub(in crate::driver) fn file(
        &mut self,
        source: &mut File,
        target: &File,
        name: &str,
    ) -> Result<(), CopyError> {
        self.check()?;
        let found = source.metadata().map_err(CopyError::io("read", &name))?;
        let taken = found.blocks().saturating_mul(STAT_BLOCK_BYTES);
        self.bytes = self.bytes.saturating_add(taken);
        if rustix::fs::ioctl_ficlone(target, &*source).is_ok() {
            return Ok(());
        }
        check_room(target, taken)?;
        target
            .set_len(found.len())
            .map_err(CopyError::io("write", &name))?;
        let mut offset = 0;
        while let Some((start, end)) =
            next_data(source, offset).map_err(CopyError::io("read", &name))?
        {
            self.range(source, target, start..end, name)?;
            offset = end;
        }
        Ok(())
    }

    fn range(
        &self,
        source: &mut File,
        target: &File,
        range: std::ops::Range<u64>,
        name: &str,
    ) -> Result<(), CopyError> {
        source
            .seek(SeekFrom::Start(range.start))
            .map_err(CopyError::io("read", &name))?;
        let mut left = source.take(range.end - range.start);
        let mut piece = vec![0; PIECE_BYTES];
        let mut offset = range.start;
        loop {
            self.check()?;
            let count = left
                .read(&mut piece)
                .map_err(CopyError::io("read", &name))?;
            if count == 0 {
                return Ok(());
            }
            target
                .write_all_at(&piece[..count], offset)
                .map_err(CopyError::io("write", &name))?;
            offset += u64::try_from(count).unwrap_or(u64::MAX);
        }
    }
}

/// Where data begins at or after `offset`, and where it ends; `None` if there is no more.
fn next_data(file: &File, offset: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match lseek64(file, to_signed(offset), Whence::SeekData) {
        Ok(start) => start,
        Err(nix::Error::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = lseek64(file, start, Whence::SeekHole)?;
    let number = |offset: i64| u64::try_from(offset).map_err(io::Error::other);
    Ok(Some((number(start)?, number(end)?)))
}

fn to_signed(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[test]
    fn data_is_copied_and_holes_stay_holes() {
        let dir = TempDir::new().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"one", 5 << 20).unwrap();
        file.write_all_at(&[7; 700_000], 33 << 20).unwrap();
        let mut source = File::open(&from).unwrap();
        let target = File::create_new(&to).unwrap();
        let mut copier = Copier::begin(CancellationToken::new());
        copier.file(&mut source, &target, "from").unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        let taken = fs::metadata(&to).unwrap().blocks() * STAT_BLOCK_BYTES;
        assert!(taken < 4 << 20, "{taken}");
        assert!(copier.bytes >= 700_000);
    }

    #[test]
    fn a_hostd_that_goes_copies_no_more() {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("from"), "data").unwrap();
        let mut source = File::open(dir.path().join("from")).unwrap();
        let target = File::create_new(dir.path().join("to")).unwrap();
        let stopping = CancellationToken::new();
        stopping.cancel();
        let copied = Copier::begin(stopping).file(&mut source, &target, "from");
        assert!(matches!(copied, Err(CopyError::Stopped)));
    }
}
