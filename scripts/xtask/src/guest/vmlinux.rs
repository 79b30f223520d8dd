//! Takes the ELF kernel out of a bzImage (Documentation/arch/x86/boot.rst).

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;

/// Offsets in the setup header.
const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;

const SECTOR_BYTES: usize = 512;

/// The payload ends in the size of what it unpacks to, which is no part of the compressed data.
const SIZE_BYTES: usize = 4;

/// The kernel is smaller than this, unpacked.
const KERNEL_BYTES_MAX: usize = 512 * 1024 * 1024;

/// A legacy LZ4 frame: this number, then blocks that unpack to at most 8 MiB, each after its length.
const LZ4_LEGACY_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
const LZ4_BLOCK_BYTES_MAX: usize = 8 * 1024 * 1024;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// The ELF kernel inside the bzImage at `path`.
pub(super) fn extract(path: &Path) -> Result<Vec<u8>> {
    let name = path.display();
    let image = fs::read(path).with_context(|| format!("Cannot read {name}"))?;
    let kernel = payload(&image)
        .and_then(unpack)
        .with_context(|| format!("{name} holds no kernel that can be unpacked"))?;
    ensure!(
        kernel.starts_with(&ELF_MAGIC),
        "The kernel in {name} is no ELF file"
    );
    Ok(kernel)
}

fn payload(image: &[u8]) -> Result<&[u8]> {
    let magic = image.get(HEADER_MAGIC..HEADER_MAGIC + 4);
    ensure!(magic == Some(b"HdrS"), "There is no setup header");
    // Zero stands for four, for the sake of very old loaders.
    let sectors = match image[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * SECTOR_BYTES + number(image, PAYLOAD_OFFSET)?;
    let end = start + number(image, PAYLOAD_LENGTH)?;
    let payload = image.get(start..end);
    payload
        .and_then(|payload| payload.len().checked_sub(SIZE_BYTES))
        .map(|length| &image[start..start + length])
        .context("The payload lies outside of the file")
}

/// The 32-bit little-endian number at `offset`.
fn number(bytes: &[u8], offset: usize) -> Result<usize> {
    let field = bytes
        .get(offset..offset + 4)
        .context("The file is cut short")?;
    Ok(u32::from_le_bytes(field.try_into()?).try_into()?)
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>> {
    if payload.starts_with(&LZ4_LEGACY_MAGIC) {
        unpack_lz4(&payload[LZ4_LEGACY_MAGIC.len()..])
    } else if payload.starts_with(&GZIP_MAGIC) {
        read_bounded(GzDecoder::new(payload))
    } else if payload.starts_with(&ZSTD_MAGIC) {
        read_bounded(zstd::Decoder::new(payload)?)
    } else {
        bail!("The payload is neither LZ4 nor gzip nor zstd")
    }
}

fn unpack_lz4(mut blocks: &[u8]) -> Result<Vec<u8>> {
    let mut kernel = Vec::new();
    let mut buffer = vec![0; LZ4_BLOCK_BYTES_MAX];
    while !blocks.is_empty() {
        let length = number(blocks, 0)?;
        let block = blocks.get(4..4 + length).context("A block is cut short")?;
        let size = lz4_flex::block::decompress_into(block, &mut buffer)?;
        kernel.extend_from_slice(&buffer[..size]);
        ensure!(kernel.len() < KERNEL_BYTES_MAX, "The kernel is too large");
        blocks = &blocks[4 + length..];
    }
    Ok(kernel)
}

fn read_bounded(stream: impl Read) -> Result<Vec<u8>> {
    let mut kernel = Vec::new();
    let bound = u64::try_from(KERNEL_BYTES_MAX)?;
    stream.take(bound).read_to_end(&mut kernel)?;
    ensure!(kernel.len() < KERNEL_BYTES_MAX, "The kernel is too large");
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const KERNEL: &[u8] = b"\x7fELF and the rest of a kernel, the rest of a kernel";

    /// A bzImage of one setup sector whose payload is `payload`.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR_BYTES + 16];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PAYLOAD_OFFSET] = 16;
        let length = u32::try_from(payload.len() + SIZE_BYTES).unwrap();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&u32::try_from(KERNEL.len()).unwrap().to_le_bytes());
        image
    }

    fn lz4(kernel: &[u8]) -> Vec<u8> {
        let block = lz4_flex::block::compress(kernel);
        let length = u32::try_from(block.len()).unwrap().to_le_bytes();
        [&LZ4_LEGACY_MAGIC[..], &length, &block].concat()
    }

    fn gzip(kernel: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(kernel).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_kernel_is_found_under_each_compression() {
        let table = [
            lz4(KERNEL),
            gzip(KERNEL),
            zstd::encode_all(KERNEL, 1).unwrap(),
        ];
        for payload in table {
            let image = image(&payload);
            assert_eq!(unpack(super::payload(&image).unwrap()).unwrap(), KERNEL);
        }
    }

    #[test]
    fn what_is_no_kernel_is_an_error() {
        let whole = image(&lz4(KERNEL));
        for length in [0, 100, PAYLOAD_LENGTH, whole.len() - 1] {
            assert!(payload(&whole[..length]).is_err(), "{length} bytes");
        }
        unpack(b"bzip2 or xz").unwrap_err();
        let mut cut = lz4(KERNEL);
        cut.truncate(12);
        unpack(&cut).unwrap_err();
    }
}
