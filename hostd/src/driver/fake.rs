//! A driver without a kernel: instances that run in memory, for tests of everything above drivers.
//!
//! It behaves rather than records: an instance runs until it is stopped, killed or told to end, is
//! still there when another hostd looks, and refuses what a real one would refuse. The word in
//! `spec.command[0]` chooses what the workload does:
//! - `true`, `false`: ends at once, with 0 or 1
//! - `stubborn`: does not end when it is asked to
//! - `absent`: there is no such program
//! - `unready`: starts, and never gets ready
//! - anything else: runs on

mod snapshots;

use std::collections::BTreeMap;
use std::future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent::protocol::Frame;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::Timestamp;
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};

use super::{
    Channel, Control, Driver, DriverError, Ended, Extent, Recovered, Running, SESSION_FRAMES_MAX,
    Session,
};
use crate::api::types::{
    DeviceStats, DiskStats, Effect, ExecRequest, Exit, Isolation, Limits, Stats, VcpuStats, VmStats,
};
use crate::limits::{Overhead, Rules};
use crate::store::Record;

/// Rules without a bound that a test could meet by accident.
pub const RULES: Rules = Rules {
    memory_min_bytes: 4096,
    memory_overhead: Overhead::NONE,
    memory_default_bytes: None,
    mounts: true,
    user_namespace: true,
    disk_size: true,
    memory_snapshots: true,
    no_console: None,
    effect: |pointer, _, _| match pointer {
        "/limits/disk/size" => Err("the disk's size is fixed at creation"),
        "/limits/memory/max" => Ok(Effect::AtRestart),
        _ => Ok(Effect::Live),
    },
};

/// The same for a kind without a console.
pub const RULES_WITHOUT_CONSOLE: Rules = Rules {
    no_console: Some("it has no console"),
    ..RULES
};

/// The host that fake instances run on; clones are the same host, so that it outlives any hostd.
#[derive(Clone, Debug, Default)]
pub struct FakeHost {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    instances: BTreeMap<String, FakeInstance>,
    next_pid: i32,
    refuse_limits: bool,
    files: snapshots::Files,
}

#[derive(Debug)]
struct FakeInstance {
    pid: i32,
    word: String,
    paused: bool,
    limits: Limits,
    /// Set once it has ended.
    ended: watch::Sender<Option<Ended>>,
}

impl FakeHost {
    /// The names of what runs or has left a trace.
    pub fn traces(&self) -> Vec<String> {
        self.lock().instances.keys().cloned().collect()
    }

    /// The limits in force on a running instance.
    pub fn limits(&self, name: &str) -> Option<Limits> {
        self.lock()
            .instances
            .get(name)
            .map(|instance| instance.limits.clone())
    }

    /// Ends a workload from within.
    pub fn finish(&self, name: &str, code: i32) {
        self.end(name, exited(Some(code), None));
    }

    /// The host loses an instance, as in a power failure: no trace, no record.
    pub fn lose(&self, name: &str) {
        self.end(name, Ended::Lost);
        self.lock().instances.remove(name);
    }

    /// Makes the kernel refuse limits from now on.
    pub fn refuse_limits(&self) {
        self.lock().refuse_limits = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, name: &str, ended: Ended) {
        if let Some(instance) = self.lock().instances.get(name) {
            instance.ended.send_if_modified(|state| {
                let first = state.is_none();
                state.get_or_insert(ended);
                first
            });
        }
    }

    fn launch(&self, record: &Record) -> Result<Running, DriverError> {
        let spec = &record.instance.spec;
        let word = spec
            .command
            .as_ref()
            .and_then(|command| command.first().cloned())
            .unwrap_or_default();
        if word == "absent" {
            return Err(DriverError::NoSuchProgram {
                message: "executable file `absent` not found".to_owned(),
            });
        }
        let mut state = self.lock();
        state.next_pid += 1;
        let instance = FakeInstance {
            pid: state.next_pid,
            paused: false,
            limits: spec.limits.clone(),
            ended: watch::Sender::new(match word.as_str() {
                "true" => Some(exited(Some(0), None)),
                "false" => Some(exited(Some(1), None)),
                _ => None,
            }),
            word,
        };
        let running = instance.running();
        state
            .instances
            .insert(record.instance.name.clone(), instance);
        Ok(running)
    }

    fn steer(&self, name: &str, control: Control) -> Result<(), DriverError> {
        let mut state = self.lock();
        let refuse_limits = state.refuse_limits;
        let instance = live(&mut state, name)?;
        let end = match control {
            Control::AskToStop if instance.word == "stubborn" => None,
            Control::AskToStop => Some(exited(Some(143), None)),
            // Its programs take a hang-up for a wish to read their configuration again.
            Control::Signal(signal) => {
                (signal != Signal::SIGHUP).then(|| exited(None, Some(signal as i32)))
            }
            Control::Kill => Some(exited(None, Some(9))),
            Control::Pause | Control::Resume => {
                instance.paused = control == Control::Pause;
                None
            }
            Control::Apply(_) if refuse_limits => {
                return Err(DriverError::Helper {
                    action: "setting limits".to_owned(),
                    message: "Device or resource busy".to_owned(),
                });
            }
            Control::Apply(limits) => {
                instance.limits = *limits;
                None
            }
        };
        drop(state);
        if let Some(end) = end {
            self.end(name, end);
        }
        Ok(())
    }
}

impl FakeInstance {
    fn running(&self) -> Running {
        let mut watched = self.ended.subscribe();
        Running {
            pid: self.pid,
            paused: self.paused,
            start_us: [("launch".to_owned(), 1)].into(),
            ready: if self.word == "unready" {
                future::pending().boxed()
            } else {
                future::ready(Ok(())).boxed()
            },
            ended: async move {
                match watched.wait_for(Option::is_some).await {
                    Ok(ended) => ended.clone().unwrap_or(Ended::Lost),
                    Err(_) => Ended::Lost,
                }
            }
            .boxed(),
        }
    }
}

fn live<'a>(state: &'a mut State, name: &str) -> Result<&'a mut FakeInstance, DriverError> {
    state
        .instances
        .get_mut(name)
        .filter(|instance| instance.ended.borrow().is_none())
        .ok_or(DriverError::NotRunning)
}

fn exited(code: Option<i32>, signal: Option<i32>) -> Ended {
    Ended::Exited {
        exit: Exit {
            code,
            signal,
            oom: false,
        },
        at: Timestamp::now(),
        error: None,
    }
}

impl Driver for FakeHost {
    fn start<'a>(
        &'a self,
        record: &'a Record,
        _await_client: bool,
    ) -> BoxFuture<'a, Result<Running, DriverError>> {
        let launched = self.launch(record);
        self.lock().files.start(&record.instance.name);
        future::ready(launched).boxed()
    }

    fn recover<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Recovered, DriverError>> {
        let state = self.lock();
        let recovered = match state.instances.get(&record.instance.name) {
            None => Recovered::Ended(Ended::Lost),
            Some(instance) => match instance.ended.borrow().clone() {
                Some(ended) => Recovered::Ended(ended),
                None => Recovered::Live(instance.running()),
            },
        };
        future::ready(Ok(recovered)).boxed()
    }

    fn control<'a>(
        &'a self,
        record: &'a Record,
        control: Control,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        future::ready(self.steer(&record.instance.name, control)).boxed()
    }

    fn open<'a>(
        &'a self,
        record: &'a Record,
        channel: Channel,
    ) -> BoxFuture<'a, Result<Session, DriverError>> {
        let found = live(&mut self.lock(), &record.instance.name).map(|_| ());
        future::ready(found.map(|()| {
            let request = match channel {
                Channel::Exec(request) => *request,
                Channel::Attach { .. } | Channel::Console { .. } => ExecRequest {
                    command: vec!["cat".to_owned()],
                    ..ExecRequest::default()
                },
            };
            converse(request)
        }))
        .boxed()
    }

    fn stats<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Stats, DriverError>> {
        let mut state = self.lock();
        let stats = live(&mut state, &record.instance.name).map(|instance| Stats {
            pids: 1,
            memory_limit_bytes: instance.limits.memory.max,
            vm: (record.instance.spec.isolation == Isolation::Vm).then(vm_stats),
            ..Stats::default()
        });
        future::ready(stats).boxed()
    }

    fn destroy<'a>(
        &'a self,
        record: &'a Record,
        extent: Extent,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.end(&record.instance.name, exited(None, Some(9)));
        let mut state = self.lock();
        state.instances.remove(&record.instance.name);
        if extent == Extent::Everything {
            state.files.forget(&record.instance.name);
        }
        future::ready(Ok(())).boxed()
    }
}

/// What a machine of two processors and two disks could have done.
fn vm_stats() -> VmStats {
    let vcpu = VcpuStats {
        run_us: Some(5),
        steal_us: None,
        ..VcpuStats::default()
    };
    let disk = |read_ops| DeviceStats {
        disk: Some(DiskStats {
            read_ops,
            ..DiskStats::default()
        }),
        ..DeviceStats::default()
    };
    VmStats {
        vcpus: vec![vcpu; 2],
        devices: [("disk0".to_owned(), disk(1)), ("disk1".to_owned(), disk(2))].into(),
        ..VmStats::default()
    }
}

/// A process that does what the first word says: `cat` gives back its input, `echo` its arguments,
/// `sleep` goes on until it is signalled, `flood` writes without end, `false` fails.
fn converse(request: ExecRequest) -> Session {
    let (input, mut frames) = mpsc::channel(SESSION_FRAMES_MAX);
    let (sender, output) = mpsc::channel(SESSION_FRAMES_MAX);
    tokio::spawn(async move {
        let word = request
            .command
            .first()
            .map_or("", String::as_str)
            .to_owned();
        let end = match word.as_str() {
            "echo" => {
                let text = request.command[1..].join(" ") + "\n";
                let data = BASE64_STANDARD.encode(text);
                // A listener that has gone has no use for the rest.
                let _ = sender.send(Frame::Stdout(data)).await;
                exit(Some(0), None)
            }
            "flood" => {
                let data = BASE64_STANDARD.encode(vec![b'x'; 64 * 1024]);
                loop {
                    tokio::select! {
                        frame = frames.recv() => if let Some(Frame::Signal(signal)) = frame {
                            break exit(None, Some(signal));
                        },
                        sent = sender.send(Frame::Stdout(data.clone())) => if sent.is_err() {
                            return;
                        },
                    }
                }
            }
            "false" => exit(Some(1), None),
            "cat" | "sleep" => loop {
                match frames.recv().await {
                    Some(Frame::Stdin(data)) if data.is_empty() && word == "cat" => {
                        break exit(Some(0), None);
                    }
                    Some(Frame::Stdin(data)) if word == "cat" => {
                        let _ = sender.send(Frame::Stdout(data)).await;
                    }
                    Some(Frame::Signal(signal)) => break exit(None, Some(signal)),
                    Some(_) => {}
                    None => break exit(None, Some(1)),
                }
            },
            _ => Frame::Error {
                code: 127,
                message: format!("executable file `{word}` not found"),
            },
        };
        let _ = sender.send(end).await;
    });
    Session { input, output }
}

fn exit(code: Option<i32>, signal: Option<i32>) -> Frame {
    Frame::Exit {
        code,
        signal,
        oom: false,
    }
}
