//! The state file: four lines of text.
//!
//! ```text
//! hostd-vmm snapshot
//! {"format":4,"vmm":"0.1.0","arch":"x86_64","kind":"full","id":"5f…","parent":null}
//! {"machine":{…},"clock":{…},"processors":[…],"devices":{…},"memory":{…}}
//! sha256 3b…
//! ```
//!
//! The first line and the fields `format` and `vmm` of the second are for ever. The number of the
//! format grows whenever a field is added or changes its meaning; this program reads its own and all
//! smaller ones, and says of a larger one who wrote it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};

use rustix::rand::GetRandomFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::hex;
use super::state::State;

/// The format that is written, and the newest that is read.
pub const FORMAT: u32 = 4;

/// The most bytes of a state file: with 32 processors and a difference of any kind it is less.
pub const STATE_BYTES_MAX: u64 = 64 << 20;

/// The first line.
const MAGIC: &str = "hostd-vmm snapshot\n";

/// What the last line begins with.
const DIGEST: &str = "sha256 ";

/// Why a state file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("the state file cannot be read")]
    Read(#[source] io::Error),
    #[error("the state file has more than {STATE_BYTES_MAX} bytes")]
    Size,
    #[error("this is not the state file of a snapshot")]
    Magic,
    #[error(
        "the snapshot is of format {format}, written by hostd-vmm {vmm}; \
         this is {}, which reads formats up to {FORMAT}",
        env!("CARGO_PKG_VERSION")
    )]
    Format { format: u32, vmm: String },
    #[error("the snapshot is of a machine of another kind, {0:?}")]
    Arch(String),
    #[error("the state file was changed or cut short: its checksum is wrong")]
    Digest,
    #[error("the state file's {part} is not of a form that this program knows")]
    Form {
        part: &'static str,
        source: serde_json::Error,
    },
}

/// Names a snapshot: 128 random bits.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Id(String);

impl Id {
    const BYTES: usize = 16;

    /// One that nobody else has.
    pub fn random() -> io::Result<Id> {
        let mut bytes = [0; Id::BYTES];
        // So few bytes come whole.
        rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty())?;
        Ok(Id(hex::encode(&bytes)))
    }
}

impl TryFrom<String> for Id {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Id, Self::Error> {
        match hex::decode(&text) {
            Some(bytes) if bytes.len() == Id::BYTES => Ok(Id(hex::encode(&bytes))),
            _ => Err("an id has 32 hexadecimal digits"),
        }
    }
}

impl From<Id> for String {
    fn from(id: Id) -> String {
        id.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a memory file holds.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// All memory.
    Full,
    /// What was written since the snapshot before.
    Diff,
}

/// The second line.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    pub format: u32,
    /// The version of the program that wrote it.
    pub vmm: String,
    pub arch: String,
    pub kind: Kind,
    pub id: Id,
    /// The snapshot that a [difference](Kind::Diff) lies over.
    pub parent: Option<Id>,
}

/// What every version can read of a header, whatever else is in it.
#[derive(Deserialize)]
struct Forever {
    format: u32,
    vmm: String,
}

impl Header {
    /// Of a snapshot that this program takes on this machine.
    pub fn new(kind: Kind, id: Id, parent: Option<Id>) -> Header {
        Header {
            format: FORMAT,
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            kind,
            id,
            parent,
        }
    }
}

/// Writes a state file. Returns how many bytes.
///
/// # Errors
///
/// If it cannot be written, or would be larger than what is read.
pub fn write(file: &mut File, header: &Header, state: &State) -> io::Result<u64> {
    let mut text = MAGIC.as_bytes().to_vec();
    serde_json::to_writer(&mut text, header)?;
    text.push(b'\n');
    serde_json::to_writer(&mut text, state)?;
    text.push(b'\n');
    text.extend(checksum(&text).bytes());
    let bytes = text.len() as u64;
    if bytes > STATE_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    file.write_all(&text)?;
    Ok(bytes)
}

/// Reads a state file.
pub fn read(file: &File) -> Result<(Header, State), FileError> {
    let mut text = Vec::new();
    file.take(STATE_BYTES_MAX + 1)
        .read_to_end(&mut text)
        .map_err(FileError::Read)?;
    if text.len() as u64 > STATE_BYTES_MAX {
        return Err(FileError::Size);
    }
    parse(&text)
}

/// The last line of a state file that begins with `text`.
pub fn checksum(text: &[u8]) -> String {
    let digest = hex::encode(&Sha256::digest(text));
    format!("{DIGEST}{digest}\n")
}

/// Reads the text of a state file.
pub fn parse(text: &[u8]) -> Result<(Header, State), FileError> {
    let rest = text
        .strip_prefix(MAGIC.as_bytes())
        .ok_or(FileError::Magic)?;
    let (header_line, rest) = line(rest).ok_or(FileError::Digest)?;
    let header = form("header");
    let Forever { format, vmm } = serde_json::from_slice(header_line).map_err(header)?;
    if !(1..=FORMAT).contains(&format) {
        return Err(FileError::Format { format, vmm });
    }
    let (state_line, digest_line) = line(rest).ok_or(FileError::Digest)?;
    let signed = &text[..text.len() - digest_line.len()];
    if digest_line != checksum(signed).as_bytes() {
        return Err(FileError::Digest);
    }
    let header: Header = serde_json::from_slice(header_line).map_err(header)?;
    if header.arch != std::env::consts::ARCH {
        return Err(FileError::Arch(header.arch));
    }
    let state = serde_json::from_slice(state_line).map_err(form("state"))?;
    Ok((header, state))
}

/// The first line, without its end, and the rest.
fn line(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = text.iter().position(|byte| *byte == b'\n')?;
    Some((&text[..end], &text[end + 1..]))
}

fn form(part: &'static str) -> impl Fn(serde_json::Error) -> FileError + Copy {
    move |source| FileError::Form { part, source }
}
