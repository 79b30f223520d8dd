//! Which blocks of memory are plugged in.

use std::ops::Range;

/// A bit for each block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Blocks {
    bits: Vec<u8>,
    count: u64,
    plugged: u64,
}

impl Blocks {
    /// So many, none plugged in.
    pub(super) fn new(count: u64) -> Blocks {
        let bytes = usize::try_from(count.div_ceil(8)).expect("usize is 64 bits");
        Blocks {
            bits: vec![0; bytes],
            count,
            plugged: 0,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// How many are plugged in.
    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// How many of these, which must exist, are plugged in.
    pub(super) fn plugged_in(&self, blocks: &Range<u64>) -> u64 {
        blocks
            .clone()
            .filter(|block| self.is_plugged(*block))
            .count() as u64
    }

    /// Plugs these, which must exist, in or out.
    pub(super) fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            let (byte, bit) = place(block);
            match (self.is_plugged(block), plugged) {
                (false, true) => self.plugged += 1,
                (true, false) => self.plugged -= 1,
                _ => continue,
            }
            self.bits[byte] ^= bit;
        }
    }

    /// Plugs all of them out.
    pub(super) fn clear(&mut self) {
        self.bits.fill(0);
        self.plugged = 0;
    }

    fn is_plugged(&self, block: u64) -> bool {
        let (byte, bit) = place(block);
        self.bits[byte] & bit != 0
    }

    /// Two hexadecimal digits for each eight blocks, the lower four of them first.
    pub(super) fn to_text(&self) -> String {
        let digits = self.bits.iter().flat_map(|byte| [byte & 0xf, byte >> 4]);
        digits
            .map(|digit| char::from_digit(digit.into(), 16).unwrap_or('0'))
            .collect()
    }

    /// The opposite of [`to_text`](Self::to_text), for so many blocks.
    pub(super) fn from_text(text: &str, count: u64) -> Option<Blocks> {
        let mut blocks = Blocks::new(count);
        if text.len() != 2 * blocks.bits.len() {
            return None;
        }
        for (position, digit) in (0..).zip(text.chars()) {
            let digit = digit.to_digit(16)?;
            for bit in (0..4).filter(|bit| digit & 1 << bit != 0) {
                let block = 4 * position + bit;
                if block >= count {
                    return None;
                }
                blocks.set(block..block + 1, true);
            }
        }
        Some(blocks)
    }
}

fn place(block: u64) -> (usize, u8) {
    let byte = usize::try_from(block / 8).expect("usize is 64 bits");
    (byte, 1 << (block % 8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_and_written_down() {
        let mut blocks = Blocks::new(13);
        assert_eq!(blocks.to_text(), "0000");
        blocks.set(2..6, true);
        blocks.set(3..4, true);
        blocks.set(12..13, true);
        assert_eq!((blocks.plugged(), blocks.plugged_in(&(0..4))), (5, 2));
        assert_eq!(blocks.to_text(), "c301");
        assert_eq!(Blocks::from_text("c301", 13), Some(blocks.clone()));
        blocks.set(0..13, false);
        assert_eq!(blocks, Blocks::new(13));
    }

    #[test]
    fn what_is_no_list_of_so_many_blocks_is_none() {
        for text in ["", "0", "00", "00000", "0g00", "0002", "00-1", "ß00"] {
            assert_eq!(Blocks::from_text(text, 13), None, "{text}");
        }
        assert_eq!(Blocks::from_text("", 0), Some(Blocks::new(0)));
    }
}
