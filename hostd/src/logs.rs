//! Reading the log that an instance's monitor writes: what is there, and what comes.
//!
//! The log is `PATH`, preceded by `PATH.1`; the monitor renames the one to the other when it is
//! full. A follower waits on inotify for either to change and on the instance to stop, so an idle
//! one costs nothing.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task;

use crate::api::types::{InstanceState, LogLine};
use crate::instance::Handle;

/// A line of the log is at most this long; a longer one is no line of the monitor's.
const LINE_BYTES_MAX: u64 = 1024 * 1024;
/// What is handed on at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// Room for an inotify event with the longest name.
const EVENT_BYTES_MAX: usize = 16 + 256;
/// More lines than a log of the largest size has.
const TAIL_MAX: usize = 1_000_000;

/// Which lines are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection {
    pub since: Option<Timestamp>,
    pub tail: Option<usize>,
    pub follow: bool,
}

/// One reader's place in a log.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    selection: Selection,
    handle: Handle,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Begin,
    /// Reads on in this file, and in its successors.
    Following(Following),
    End,
}

#[derive(Debug)]
struct Following {
    file: Option<BufReader<File>>,
    /// A stream of inotify events; what they say does not matter, only that they come.
    changes: pipe::Receiver,
    /// The instance had stopped before the last look at the file.
    last_look: bool,
}

impl LogReader {
    pub fn open(path: PathBuf, selection: Selection, handle: Handle) -> Self {
        Self {
            path,
            selection,
            handle,
            stage: Stage::Begin,
        }
    }

    /// The next lines of JSON, one or more; `None` at the end.
    ///
    /// # Errors
    /// The log cannot be read or watched.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            match std::mem::replace(&mut self.stage, Stage::End) {
                Stage::Begin => {
                    let lines = self.begin().await?;
                    if !lines.is_empty() {
                        return Ok(Some(lines));
                    }
                }
                Stage::Following(following) => {
                    if let Some(lines) = self.follow(following).await? {
                        return Ok(Some(lines));
                    }
                }
                Stage::End => return Ok(None),
            }
        }
    }

    /// What is there already.
    async fn begin(&mut self) -> io::Result<Vec<u8>> {
        let changes = self
            .selection
            .follow
            .then(|| watch(&self.path))
            .transpose()?;
        let path = self.path.clone();
        let selection = self.selection;
        let (lines, file) = blocking(move || read_existing(&path, selection)).await?;
        if let Some(changes) = changes {
            self.stage = Stage::Following(Following {
                file,
                changes,
                last_look: false,
            });
        }
        Ok(lines)
    }

    /// Waits for more lines; `None` if a wait came to nothing or nothing more will come.
    async fn follow(&mut self, mut following: Following) -> io::Result<Option<Vec<u8>>> {
        let path = self.path.clone();
        let since = self.selection.since;
        let (lines, mut following) = blocking(move || {
            let lines = read_on(&mut following.file, &path, since)?;
            Ok((lines, following))
        })
        .await?;
        if !lines.is_empty() {
            self.stage = Stage::Following(following);
            return Ok(Some(lines));
        }
        if following.last_look {
            return Ok(None);
        }
        let at_rest = [
            InstanceState::Created,
            InstanceState::Stopped,
            InstanceState::Failed,
        ];
        let mut events = [0; EVENT_BYTES_MAX];
        tokio::select! {
            read = following.changes.read(&mut events) => {
                read?;
            }
            // It has stopped or is gone; what it wrote last may still be unread.
            _ = self.handle.wait(&at_rest) => following.last_look = true,
        }
        self.stage = Stage::Following(following);
        Ok(None)
    }
}

/// Watches the log's directory, which must be there for the log to appear in.
fn watch(path: &Path) -> io::Result<pipe::Receiver> {
    let directory = path.parent().unwrap_or(path);
    fs::create_dir_all(directory)?;
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let events = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    inotify.add_watch(directory, events)?;
    // An inotify descriptor reads like a pipe.
    pipe::Receiver::from_owned_fd_unchecked(inotify.into())
}

/// The wanted lines of the log as it is, and the file to read on in.
fn read_existing(
    path: &Path,
    selection: Selection,
) -> io::Result<(Vec<u8>, Option<BufReader<File>>)> {
    // The newer one first: if it is renamed meanwhile, it is this same file that is read on.
    let mut newer = open(path)?;
    let mut older = open(&predecessor(path))?;
    if same_file(newer.as_ref(), older.as_ref())? {
        older = None;
    }
    let most = selection.tail.unwrap_or(TAIL_MAX).min(TAIL_MAX);
    let mut kept: VecDeque<Vec<u8>> = VecDeque::new();
    for file in [&mut older, &mut newer].into_iter().flatten() {
        while let Some(line) = next_line(file)? {
            if is_wanted(&line, selection.since) {
                kept.push_back(line);
            }
            if kept.len() > most {
                kept.pop_front();
            }
        }
    }
    Ok((kept.into_iter().flatten().collect(), newer))
}

/// Lines that have come since, from the file and, once it is used up, from its successor.
fn read_on(
    file: &mut Option<BufReader<File>>,
    path: &Path,
    since: Option<Timestamp>,
) -> io::Result<Vec<u8>> {
    let mut lines = Vec::new();
    loop {
        if let Some(file) = file {
            while lines.len() < CHUNK_BYTES
                && let Some(line) = next_line(file)?
            {
                if is_wanted(&line, since) {
                    lines.extend(line);
                }
            }
        }
        if !lines.is_empty() {
            return Ok(lines);
        }
        let successor = open(path)?;
        if successor.is_none() || same_file(successor.as_ref(), file.as_ref())? {
            return Ok(lines);
        }
        *file = successor;
    }
}

/// The next whole line. What the monitor has written half of is left for the next time.
fn next_line(file: &mut BufReader<File>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    file.by_ref()
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        return Ok(Some(line));
    }
    let read = i64::try_from(line.len()).unwrap_or_default();
    file.seek_relative(-read)?;
    Ok(None)
}

fn is_wanted(line: &[u8], since: Option<Timestamp>) -> bool {
    #[derive(Deserialize)]
    struct Stamp {
        at: Timestamp,
    }
    match since {
        None => true,
        Some(since) => serde_json::from_slice::<Stamp>(line).is_ok_and(|line| line.at >= since),
    }
}

/// The last lines of a log, for an error message.
pub fn last_lines(path: &Path, count: usize) -> Vec<LogLine> {
    let selection = Selection {
        tail: Some(count),
        ..Selection::default()
    };
    let (lines, _) = read_existing(path, selection).unwrap_or_default();
    lines
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn predecessor(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn open(path: &Path) -> io::Result<Option<BufReader<File>>> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn same_file(one: Option<&BufReader<File>>, other: Option<&BufReader<File>>) -> io::Result<bool> {
    let (Some(one), Some(other)) = (one, other) else {
        return Ok(false);
    };
    let (one, other) = (one.get_ref().metadata()?, other.get_ref().metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::TempDir;

    use super::*;

    fn line(second: i64, text: &str) -> String {
        let at = Timestamp::from_second(second).unwrap();
        let line = LogLine {
            at,
            stream: "stdout".to_owned(),
            text: text.to_owned(),
        };
        serde_json::to_string(&line).unwrap() + "\n"
    }

    fn texts(lines: &[u8]) -> Vec<String> {
        lines
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice::<LogLine>(line).unwrap().text)
            .collect()
    }

    #[test]
    fn both_files_are_read_and_selections_apply() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("log");
        fs::write(predecessor(&path), line(1, "a") + &line(2, "b")).unwrap();
        fs::write(&path, line(3, "c") + &line(4, "d") + "{\"at\":").unwrap();
        let read = |selection| texts(&read_existing(&path, selection).unwrap().0);
        assert_eq!(read(Selection::default()), ["a", "b", "c", "d"]);
        let tail = Some(3);
        assert_eq!(
            read(Selection {
                tail,
                ..Selection::default()
            }),
            ["b", "c", "d"]
        );
        let since = Some(Timestamp::from_second(3).unwrap());
        assert_eq!(
            read(Selection {
                since,
                ..Selection::default()
            }),
            ["c", "d"]
        );
        let tail = Some(0);
        assert!(
            read(Selection {
                tail,
                ..Selection::default()
            })
            .is_empty()
        );
    }

    #[test]
    fn reading_on_finishes_half_lines_and_goes_over_a_rotation() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("log");
        let (first, rest) = (line(1, "a"), line(2, "b"));
        fs::write(&path, first.clone() + &rest[..5]).unwrap();
        let (lines, mut file) = read_existing(&path, Selection::default()).unwrap();
        assert_eq!(texts(&lines), ["a"]);

        let mut writer = File::options().append(true).open(&path).unwrap();
        writer.write_all(&rest.as_bytes()[5..]).unwrap();
        fs::rename(&path, predecessor(&path)).unwrap();
        fs::write(&path, line(3, "c")).unwrap();
        let mut heard = texts(&read_on(&mut file, &path, None).unwrap());
        heard.extend(texts(&read_on(&mut file, &path, None).unwrap()));
        assert_eq!(heard, ["b", "c"]);
        assert!(read_on(&mut file, &path, None).unwrap().is_empty());
    }

    #[test]
    fn a_log_that_is_not_there_is_empty() {
        let dir = TempDir::new().unwrap();
        let (lines, file) = read_existing(&dir.path().join("log"), Selection::default()).unwrap();
        assert!(lines.is_empty() && file.is_none());
    }
}
