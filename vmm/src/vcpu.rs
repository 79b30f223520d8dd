//! A virtual processor: a thread that goes from state to state, each a function that returns the
//! next.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::control::{ExitReason, ExitStatus, VcpuExits};
use crate::exit::ExitSwitch;
use crate::kvm;

/// The address spaces of the machine.
#[derive(Debug, Default)]
pub struct Buses {
    /// I/O ports.
    pub ports: Bus,
    /// Physical memory that is not RAM.
    pub memory: Bus,
}

/// Why a processor cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("cannot start a thread for virtual processor {id}")]
    Thread { id: u8, source: io::Error },
    #[error("virtual processor {id} cannot run")]
    Run { id: u8, source: kvm_ioctls::Error },
    #[error("KVM cannot go on with virtual processor {id}: internal error {suberror}")]
    Kvm { id: u8, suberror: u32 },
    #[error("virtual processor {id} stopped for an unknown reason: {exit}")]
    Unexpected { id: u8, exit: String },
}

/// What processors are to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    Park,
    Run,
    Finish,
}

/// Where a processor is.
#[derive(Clone, Copy)]
enum State {
    Parked,
    Running,
    Finished,
}

impl From<Order> for State {
    fn from(order: Order) -> State {
        match order {
            Order::Park => State::Parked,
            Order::Run => State::Running,
            Order::Finish => State::Finished,
        }
    }
}

/// Where processors get their orders and wait.
#[derive(Debug)]
struct Gate {
    inner: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    order: Order,
    /// Processors that wait, or that are gone for good.
    still: usize,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.inner.lock().expect("nothing panics in here")
    }

    fn order(&self) -> Order {
        self.lock().order
    }

    fn set(&self, order: Order) {
        let mut state = self.lock();
        if state.order != Order::Finish {
            state.order = order;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Waits as long as the order is to.
    fn park(&self) -> Order {
        let mut state = self.lock();
        state.still += 1;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |state| state.order == Order::Park)
            .expect("nothing panics in here");
        state.still -= 1;
        state.order
    }

    /// A processor will not run again.
    fn leave(&self) {
        self.lock().still += 1;
        self.changed.notify_all();
    }
}

/// All processors of a machine. They wait until [`resume`](Self::resume), and are gone after
/// [`finish`](Self::finish) or a drop.
#[derive(Debug)]
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    exits: Vec<Arc<Exits>>,
    schedules: Vec<Arc<OnceLock<File>>>,
}

/// How often a processor came out of guest mode, by what for. They wrap at 2^64.
#[derive(Debug, Default)]
struct Exits {
    port_reads: AtomicU64,
    port_writes: AtomicU64,
    memory_reads: AtomicU64,
    memory_writes: AtomicU64,
    interruptions: AtomicU64,
    others: AtomicU64,
}

impl Exits {
    /// As they are now.
    fn stats(&self) -> VcpuExits {
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VcpuExits {
            port_reads: value(&self.port_reads),
            port_writes: value(&self.port_writes),
            memory_reads: value(&self.memory_reads),
            memory_writes: value(&self.memory_writes),
            interruptions: value(&self.interruptions),
            others: value(&self.others),
        }
    }
}

/// One more, before it is dealt with: whoever sees what became of it finds it counted.
fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// How long a processor has run, and how long it could have and the host's processors did something
/// else, which its guest sees as stolen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct VcpuTimes {
    pub ran: Duration,
    pub waited: Duration,
}

impl VcpuTimes {
    /// From what `/proc/PID/task/TID/schedstat` says of a processor's thread: how long it ran, how long it
    /// waited, how often it came to run. `None` if the kernel does not count, which it says by zeroes.
    pub fn parse(schedstat: &str) -> Option<VcpuTimes> {
        let mut numbers = schedstat.split_ascii_whitespace().map(str::parse);
        let mut next = || numbers.next()?.ok();
        let (ran, waited, turns) = (next()?, next()?, next()?);
        (turns > 0).then_some(VcpuTimes {
            ran: Duration::from_nanos(ran),
            waited: Duration::from_nanos(waited),
        })
    }
}

/// What the thread of the processor with this number is called.
pub fn thread_name(id: u8) -> String {
    format!("vcpu{id}")
}

/// Threads for processors that are still to be made: others make those while they start.
#[derive(Debug)]
pub struct VcpuThreads {
    /// By number of the processor.
    threads: Vec<VcpuThread>,
}

#[derive(Debug)]
struct VcpuThread {
    vcpu: Sender<Vcpu>,
    schedule: Arc<OnceLock<File>>,
    thread: JoinHandle<()>,
}

/// What the kernel tells the thread that opens it of itself.
const SCHEDULE: &str = "/proc/thread-self/schedstat";

impl VcpuThreads {
    /// Starts `count` of them. `enter` runs first in each.
    pub fn start(count: u8, enter: &Arc<dyn Fn() + Send + Sync>) -> Result<Self, VcpuError> {
        let mut threads = Vec::new();
        for id in 0..count {
            let (sender, receiver) = channel::<Vcpu>();
            let (enter, schedule) = (enter.clone(), Arc::<OnceLock<File>>::default());
            let ours = schedule.clone();
            let thread = thread::Builder::new()
                .name(thread_name(id))
                .spawn(move || {
                    // Before the thread may open nothing any more. In an empty root there is none.
                    if let Ok(file) = File::open(SCHEDULE) {
                        ours.get_or_init(|| file);
                    }
                    enter();
                    // Without a processor there is no machine.
                    if let Ok(vcpu) = receiver.recv() {
                        vcpu.live();
                    }
                })
                .map_err(|source| VcpuError::Thread { id, source })?;
            threads.push(VcpuThread {
                vcpu: sender,
                schedule,
                thread,
            });
        }
        Ok(Self { threads })
    }
}

impl Vcpus {
    /// Gives each of `vcpus` to one of `threads`, of which there are as many.
    pub fn new(
        threads: VcpuThreads,
        vcpus: Vec<VcpuFd>,
        buses: &Arc<Buses>,
        exit: &ExitSwitch,
    ) -> Self {
        let gate = Arc::new(Gate {
            inner: Mutex::new(GateState {
                order: Order::Park,
                still: 0,
            }),
            changed: Condvar::new(),
        });
        let fds = vcpus.into_iter().map(|fd| Arc::new(Mutex::new(fd)));
        let mut all = Self {
            gate,
            threads: Mutex::default(),
            fds: fds.collect(),
            exits: Vec::new(),
            schedules: Vec::new(),
        };
        for ((id, fd), its) in (0..).zip(all.fds.clone()).zip(threads.threads) {
            let vcpu = Vcpu {
                id,
                fd,
                buses: buses.clone(),
                exit: exit.clone(),
                gate: all.gate.clone(),
                exits: Arc::default(),
            };
            all.exits.push(vcpu.exits.clone());
            // A thread that is gone has said why.
            let _ = its.vcpu.send(vcpu);
            all.threads().push(its.thread);
            all.schedules.push(its.schedule);
        }
        all
    }

    /// Lets them run.
    pub fn resume(&self) {
        self.gate.set(Order::Run);
    }

    /// Stops them; when it returns, none runs guest code or is in a device.
    pub fn pause(&self) {
        self.gate.set(Order::Park);
        self.interrupt();
        let state = self.gate.lock();
        let _state = self
            .gate
            .changed
            .wait_while(state, |state| {
                state.order == Order::Park && state.still < self.fds.len()
            })
            .expect("nothing panics in here");
    }

    /// Whether they are to wait.
    pub fn paused(&self) -> bool {
        self.gate.order() == Order::Park
    }

    /// Looks at each of them, by number. None runs: they are paused, or were never resumed.
    pub fn inspect<T, E>(
        &self,
        look: impl Fn(usize, &VcpuFd) -> Result<T, E>,
    ) -> Result<Vec<T>, E> {
        let fds = self.fds.iter().enumerate();
        fds.map(|(id, fd)| look(id, &lock(fd))).collect()
    }

    /// For each, how often it came out of guest mode, by what for.
    pub fn exits(&self) -> Vec<VcpuExits> {
        self.exits.iter().map(|exits| exits.stats()).collect()
    }

    /// For each, where its time went, if the kernel tells.
    pub fn times(&self) -> Option<Vec<VcpuTimes>> {
        let times = self.schedules.iter().map(|file| times(file.get()?));
        times.collect()
    }

    /// Ends them all, and waits until they are gone.
    pub fn finish(&self) {
        self.gate.set(Order::Finish);
        self.interrupt();
        for thread in self.threads().drain(..) {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().expect("nothing panics in here")
    }

    fn interrupt(&self) {
        for thread in self.threads().iter() {
            kvm::interrupt(thread);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.finish();
    }
}

fn times(schedule: &File) -> Option<VcpuTimes> {
    let mut text = [0; 80];
    let count = schedule.read_at(&mut text, 0).ok()?;
    VcpuTimes::parse(str::from_utf8(&text[..count]).ok()?)
}

/// A processor is its thread's as long as it runs, and anybody's while that is parked.
fn lock(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    fd.lock().expect("a panic ends the process")
}

struct Vcpu {
    id: u8,
    fd: Arc<Mutex<VcpuFd>>,
    buses: Arc<Buses>,
    exit: ExitSwitch,
    gate: Arc<Gate>,
    exits: Arc<Exits>,
}

impl Vcpu {
    fn live(self) {
        kvm::accept_interrupts(&mut lock(&self.fd));
        let mut state = State::Parked;
        loop {
            state = match state {
                State::Parked => self.parked(),
                State::Running => self.running(),
                State::Finished => break,
            };
        }
        kvm::refuse_interrupts();
        self.gate.leave();
    }

    fn parked(&self) -> State {
        let order = self.gate.park();
        if order == Order::Run {
            // Keeps the guest's watchdog from taking the pause for a hang. A guest that does not
            // use KVM's clock has no such watchdog, and makes this fail.
            let _ = lock(&self.fd).kvmclock_ctrl();
        }
        order.into()
    }

    /// Runs guest code until there is another order, or the end.
    fn running(&self) -> State {
        let mut fd = lock(&self.fd);
        loop {
            match self.run_once(&mut fd) {
                Ok(State::Running) => {}
                Ok(state) => return state,
                Err(error) => {
                    self.exit.fail(&error);
                    return State::Finished;
                }
            }
        }
    }

    /// Runs guest code until it needs something of us.
    fn run_once(&self, fd: &mut VcpuFd) -> Result<State, VcpuError> {
        let exits = &self.exits;
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.port_reads);
                self.buses.ports.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&exits.port_writes);
                self.buses.ports.write(port.into(), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.memory_reads);
                self.buses.memory.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.memory_writes);
                self.buses.memory.write(address, data);
            }
            // The guest's processor has nowhere to go: a real one would reset.
            Ok(VcpuExit::Shutdown) => {
                self.exit.end(ExitStatus {
                    error: Some(format!(
                        "was reset: virtual processor {} could not go on (a triple fault)",
                        self.id
                    )),
                    ..ExitStatus::new(ExitReason::Reset)
                });
                return Ok(State::Finished);
            }
            Ok(VcpuExit::InternalError) => {
                return Err(VcpuError::Kvm {
                    id: self.id,
                    suberror: kvm::internal_error(fd),
                });
            }
            Ok(other) => {
                return Err(VcpuError::Unexpected {
                    id: self.id,
                    exit: format!("{other:?}"),
                });
            }
            Err(error) if error.errno() == libc::EINTR => {
                // Cleared before the order is read: whoever gives one interrupts after.
                fd.set_kvm_immediate_exit(0);
                count(&exits.interruptions);
                return Ok(self.gate.order().into());
            }
            // A processor that is still switched off was woken.
            Err(error) if error.errno() == libc::EAGAIN => count(&exits.others),
            Err(source) => {
                return Err(VcpuError::Run {
                    id: self.id,
                    source,
                });
            }
        }
        Ok(State::Running)
    }
}
