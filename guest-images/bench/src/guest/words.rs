//! The words of the command line.

use crate::Failure;

/// The words of `command_line`.
pub(crate) fn of(command_line: &[u8]) -> impl Iterator<Item = &[u8]> {
    command_line.split(|byte| *byte == b' ')
}

/// The parts of a word, of which the first is a name.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Of `NAME:FIELD:FIELD`.
    pub(crate) fn new(word: &'a [u8]) -> Self {
        Self { rest: word }
    }

    /// The next field.
    pub(crate) fn name(&mut self) -> &'a [u8] {
        let (field, rest) = split(self.rest, b':');
        self.rest = rest;
        field
    }

    /// The next field as a decimal number.
    pub(crate) fn number(&mut self) -> Result<u64, Failure> {
        number(self.name(), 10).ok_or(Failure::Word)
    }
}

/// The addresses of all `virtio_mmio.device=SIZE@ADDRESS:LINE`.
pub(crate) fn windows(command_line: &[u8]) -> impl Iterator<Item = usize> {
    of(command_line).filter_map(|word| {
        let device = word.strip_prefix(b"virtio_mmio.device=")?;
        let (_, place) = split(device, b'@');
        let (address, _) = split(place, b':');
        let address = number(address.strip_prefix(b"0x")?, 16)?;
        usize::try_from(address).ok()
    })
}

/// What is before and behind the first `separator`.
fn split(text: &[u8], separator: u8) -> (&[u8], &[u8]) {
    let mut parts = text.splitn(2, |byte| *byte == separator);
    let first = parts.next().unwrap_or_default();
    (first, parts.next().unwrap_or_default())
}

fn number(digits: &[u8], radix: u8) -> Option<u64> {
    let mut value = 0_u64;
    for digit in digits {
        let digit = char::from(*digit).to_digit(radix.into())?;
        value = value.wrapping_mul(radix.into()).wrapping_add(digit.into());
    }
    (!digits.is_empty()).then_some(value)
}
