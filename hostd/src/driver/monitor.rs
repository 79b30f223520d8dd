//! hostd's side of the monitor: launching one, asking it, and learning of the end from it or from
//! what it left. The other side, and the words, are in `container::monitor`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use container::monitor::protocol::{
    ExitRecord, LINE_BYTES_MAX, MonitorSpec, Ready, Request, Response,
};
use futures::{SinkExt, StreamExt};
use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time;
use tokio_util::codec::{Framed, LinesCodec};

use super::{DriverError, Ended};
use crate::api::types::Exit;
use crate::process::Identity;

/// A monitor that has not said by then that the process runs is given up.
const READY_DEADLINE: Duration = Duration::from_secs(30);
/// A monitor does nothing but answer; one that is silent this long is stuck.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// After the end, how long the monitor may take to remove the container.
const REMOVAL_DEADLINE: Duration = Duration::from_secs(15);
/// Between looks at a monitor that lives but does not take connections.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(500);

/// The monitor of one run directory.
#[derive(Clone, Debug)]
pub(super) struct Monitor {
    dir: PathBuf,
}

impl Monitor {
    pub(super) fn of(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("monitor.sock")
    }

    /// Starts a monitor, which starts the process. Returns the process's pid.
    ///
    /// If it fails something may be left running; the caller tears down.
    pub(super) async fn launch(
        &self,
        program: &Path,
        spec: &MonitorSpec,
    ) -> Result<i32, DriverError> {
        let json = serde_json::to_vec_pretty(spec).expect("paths of ours are UTF-8");
        let path = self.dir.join("monitor.json");
        fs::write(&path, json).map_err(DriverError::io("writing monitor.json"))?;
        let log = File::create(self.dir.join("monitor.log"))
            .map_err(DriverError::io("making the monitor's log"))?;
        let mut child = Command::new(program)
            .arg("monitor")
            .arg("--dir")
            .arg(&self.dir)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // What the terminal sends to hostd's group is not meant for the instances.
            .process_group(0)
            .spawn()
            .map_err(DriverError::io(format!("starting {}", program.display())))?;
        let ready = time::timeout(READY_DEADLINE, read_ready(&mut child)).await;
        // Reaped when it goes; it may outlive this hostd.
        tokio::spawn(async move { child.wait().await });
        match ready {
            Ok(Ok(Ready::Running { pid, .. })) => Ok(pid),
            Ok(Ok(Ready::Failed { message, exit_code })) => {
                Err(DriverError::of_workload(exit_code, message))
            }
            Ok(Err(source)) => Err(DriverError::Helper {
                action: "starting the monitor".to_owned(),
                message: format!("{source}; {}", self.last_words()),
            }),
            Err(_) => Err(DriverError::Timeout {
                seconds: READY_DEADLINE.as_secs(),
            }),
        }
    }

    /// What the monitor complained of last.
    fn last_words(&self) -> String {
        let text = fs::read_to_string(self.dir.join("monitor.log")).unwrap_or_default();
        text.lines().last().unwrap_or("it said nothing").to_owned()
    }

    /// Asks what is answered at once.
    pub(super) async fn ask(&self, request: &Request) -> Result<Response, DriverError> {
        let asked = async { exchange(&mut self.connect().await?, request).await };
        let answer =
            time::timeout(ANSWER_DEADLINE, asked)
                .await
                .map_err(|_| DriverError::Timeout {
                    seconds: ANSWER_DEADLINE.as_secs(),
                })?;
        match answer {
            Ok(Response::Error { message }) => Err(DriverError::Helper {
                action: "asking the monitor".to_owned(),
                message,
            }),
            Ok(response) => Ok(response),
            Err(error) if is_absent(&error) => Err(DriverError::NotRunning),
            Err(source) => Err(DriverError::Io {
                action: "asking the monitor".to_owned(),
                source,
            }),
        }
    }

    /// A connection on which the request has been answered with `done` and frames follow.
    pub(super) async fn converse(
        &self,
        request: &Request,
    ) -> Result<Framed<UnixStream, LinesCodec>, DriverError> {
        let asked = async {
            let mut connection = self.connect().await?;
            let response = exchange(&mut connection, request).await?;
            Ok((connection, response))
        };
        let opened: io::Result<_> =
            time::timeout(ANSWER_DEADLINE, asked)
                .await
                .map_err(|_| DriverError::Timeout {
                    seconds: ANSWER_DEADLINE.as_secs(),
                })?;
        match opened {
            Ok((connection, Response::Done {})) => Ok(connection),
            Ok((_, Response::Error { message })) => Err(DriverError::Helper {
                action: "attaching".to_owned(),
                message,
            }),
            Ok((_, Response::Running { .. } | Response::Exited(_))) => Err(DriverError::NotRunning),
            Err(error) if is_absent(&error) => Err(DriverError::NotRunning),
            Err(source) => Err(DriverError::Io {
                action: "attaching".to_owned(),
                source,
            }),
        }
    }

    async fn connect(&self) -> io::Result<Framed<UnixStream, LinesCodec>> {
        let stream = UnixStream::connect(self.socket()).await?;
        Ok(Framed::new(
            stream,
            LinesCodec::new_with_max_length(LINE_BYTES_MAX),
        ))
    }

    /// The end, once it has come and the monitor has removed what it made.
    pub(super) async fn ended(self) -> Ended {
        loop {
            if let Ok(ended) = self.wait().await {
                return ended;
            }
            // The socket's closing is only a hint; the record is the truth.
            let alive = self.is_alive();
            match self.record() {
                Some(ended) => return ended,
                None if !alive => return Ended::Lost,
                None => time::sleep(RECONNECT_INTERVAL).await,
            }
        }
    }

    async fn wait(&self) -> io::Result<Ended> {
        let mut connection = self.connect().await?;
        let Response::Exited(record) = exchange(&mut connection, &Request::Wait {}).await? else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        // The connection closes when the container is removed. If that takes too long it is removed
        // by force later.
        let _ = time::timeout(REMOVAL_DEADLINE, connection.next()).await;
        Ok(to_ended(&record))
    }

    /// Whether there is a monitor: it holds a lock on its `monitor.json` as long as it lives.
    pub(super) fn is_alive(&self) -> bool {
        let Ok(file) = File::open(self.dir.join("monitor.json")) else {
            return false;
        };
        Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
    }

    /// The end, if the monitor has recorded one.
    pub(super) fn record(&self) -> Option<Ended> {
        let text = fs::read(self.dir.join("exit.json")).ok()?;
        let record: ExitRecord = serde_json::from_slice(&text).ok()?;
        Some(to_ended(&record))
    }

    /// The process of this directory's monitor, whoever started it.
    pub(super) fn find(&self) -> Option<Identity> {
        Identity::find_by_arguments(|arguments| {
            arguments.windows(3).any(|window| {
                window[0] == b"monitor"
                    && window[1] == b"--dir"
                    && window[2] == self.dir.as_os_str().as_encoded_bytes()
            })
        })
    }
}

/// Whether nobody listens.
fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

async fn read_ready(child: &mut Child) -> io::Result<Ready> {
    let stdout = child.stdout.take().expect("the stream is piped");
    let bound = u64::try_from(LINE_BYTES_MAX).unwrap_or(u64::MAX);
    let mut line = String::new();
    BufReader::new(stdout.take(bound))
        .read_line(&mut line)
        .await?;
    if line.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it went without a word",
        ));
    }
    Ok(serde_json::from_str(&line)?)
}

async fn exchange(
    connection: &mut Framed<UnixStream, LinesCodec>,
    request: &Request,
) -> io::Result<Response> {
    let line = serde_json::to_string(request).expect("a request has only plain values");
    connection.send(line).await.map_err(io::Error::other)?;
    match connection.next().await {
        Some(line) => Ok(serde_json::from_str(&line.map_err(io::Error::other)?)?),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn to_ended(record: &ExitRecord) -> Ended {
    Ended::Exited {
        exit: Exit {
            code: record.code,
            signal: record.signal,
            oom: record.oom,
        },
        at: record.finished_at,
        error: None,
    }
}
