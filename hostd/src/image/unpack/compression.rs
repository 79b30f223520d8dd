//! How a layer is compressed, by its first bytes: the media type is only a claim.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use zstd::stream::read::Decoder;

/// A zstd frame may ask for a window of two to this power, 128 MiB: the format's own default bound.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// Skippable frames, which may come first: 0x184D2A50 to 0x184D2A5F, little-endian.
const ZSTD_SKIPPABLE: &[u8] = &[0x2a, 0x4d, 0x18];

/// The tar stream inside of `layer`.
pub(in crate::image) fn decompress<'a>(
    mut layer: impl BufRead + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    // A network's first read may be shorter than a magic number.
    let mut head = Vec::with_capacity(4);
    layer.by_ref().take(4).read_to_end(&mut head)?;
    let is_gzip = head.starts_with(GZIP_MAGIC);
    let is_zstd = head.starts_with(ZSTD_MAGIC) || head.get(1..4) == Some(ZSTD_SKIPPABLE);
    let layer = io::Cursor::new(head).chain(layer);
    if is_gzip {
        Ok(Box::new(MultiGzDecoder::new(layer)))
    } else if is_zstd {
        let mut decoder = Decoder::with_buffer(layer)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
        Ok(Box::new(decoder))
    } else {
        Ok(Box::new(layer))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    #[test]
    fn each_kind_of_layer_gives_the_same_stream() {
        let plain = b"the same stream ".repeat(10_000);
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        // Parallel compressors write several members, one after the other.
        let members = [gzip.clone(), gzip.clone()].concat();
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        for (layer, times) in [
            (plain.clone(), 1),
            (gzip, 1),
            (members, 2),
            (zstd, 1),
            (vec![], 0),
        ] {
            let mut stream = Vec::new();
            decompress(&layer[..])
                .unwrap()
                .read_to_end(&mut stream)
                .unwrap();
            assert_eq!(stream, plain.repeat(times));
        }
    }

    #[test]
    fn a_cut_layer_is_an_error() {
        let plain = b"the same stream ".repeat(10_000);
        let zstd = zstd::encode_all(&plain[..], 1).unwrap();
        let cut = &zstd[..zstd.len() / 2];
        let error = decompress(cut)
            .unwrap()
            .read_to_end(&mut Vec::new())
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
