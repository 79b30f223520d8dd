//! Event loops: a thread waits for descriptors and hands readiness to their owners. The machine has
//! one, and a branch of it for each device that may keep a thread busy.

mod branch;
mod stop;
mod wakefulness;

use std::hint;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::branch::Branches;
pub use self::stop::Stopper;
use self::wakefulness::Wakefulness;
use crate::exit::ExitSwitch;

/// Readiness taken from the kernel in one call.
const BATCH: usize = 32;

/// The source number of the exit switch, which has no owner.
const EXIT: u32 = u32::MAX;

/// How often a loop that is kept awake by some sources asks the kernel about the others.
const OTHERS_EVERY: Duration = Duration::from_micros(20);

/// As `epoll_wait` takes them, in milliseconds.
const FOREVER: i32 = -1;
const NOT_AT_ALL: i32 = 0;

/// A counter that makes a descriptor readable. Neither end of it ever waits.
pub fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// What a descriptor is ready for, or is waited for. A closed other end counts as both.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Readiness {
    pub readable: bool,
    pub writable: bool,
}

impl Readiness {
    /// Something to read.
    pub const READABLE: Readiness = Readiness {
        readable: true,
        writable: false,
    };

    fn events(self) -> EventSet {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, self.readable);
        events.set(EventSet::OUT, self.writable);
        events
    }
}

/// The owner of descriptors.
pub trait Source: Send + Sync {
    /// The descriptor of `token` is, or very recently was, ready.
    fn on_ready(&self, token: u32, readiness: Readiness);

    /// Whether work may have come since of which no descriptor tells. If so,
    /// [`poll`](Self::poll) is called as long as it is worth it, and then [`rest`](Self::rest).
    fn busy(&self) -> bool {
        false
    }

    /// Does what has come since; whether there was something.
    fn poll(&self) -> bool {
        false
    }

    /// From now on descriptors are to tell of all work again. Returns whether some has come in
    /// between, in which case they do not yet.
    fn rest(&self) -> bool {
        false
    }
}

/// The set of descriptors that are waited for, level-triggered. Any thread may change it.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// Waits for `fd` on behalf of `source`, which is told of it as `token`.
    pub fn add(&self, source: u32, token: u32, fd: RawFd, wanted: Readiness) -> io::Result<()> {
        self.control(ControlOperation::Add, source, token, fd, wanted)
    }

    /// Waits for something else of a descriptor that is in the set.
    pub fn modify(&self, source: u32, token: u32, fd: RawFd, wanted: Readiness) -> io::Result<()> {
        self.control(ControlOperation::Modify, source, token, fd, wanted)
    }

    /// Waits for `fd` no longer. Closing a descriptor does the same.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        self.epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default())
    }

    fn control(
        &self,
        operation: ControlOperation,
        source: u32,
        token: u32,
        fd: RawFd,
        wanted: Readiness,
    ) -> io::Result<()> {
        let data = u64::from(source) << 32 | u64::from(token);
        self.epoll
            .ctl(operation, fd, EpollEvent::new(wanted.events(), data))
    }
}

/// The loop and the owners it serves.
pub struct EventLoop {
    poller: Arc<Poller>,
    sources: Vec<Option<Arc<dyn Source>>>,
    branches: Branches,
    exit: ExitSwitch,
    stopper: Option<Stopper>,
}

opaque_debug!(EventLoop);

impl EventLoop {
    /// A loop that runs until `exit`.
    pub fn new(exit: ExitSwitch) -> io::Result<Self> {
        let poller = Poller {
            epoll: Epoll::new()?,
        };
        poller.add(EXIT, 0, exit.wake_fd(), Readiness::READABLE)?;
        Ok(Self {
            poller: Arc::new(poller),
            sources: Vec::new(),
            branches: Branches::default(),
            exit,
            stopper: None,
        })
    }

    /// The set of descriptors.
    pub fn poller(&self) -> Arc<Poller> {
        self.poller.clone()
    }

    /// A number for a source that is still to be made.
    pub fn reserve(&mut self) -> u32 {
        self.sources.push(None);
        u32::try_from(self.sources.len() - 1).expect("one for each device")
    }

    /// Hands readiness of number `source` to `owner` from now on.
    pub fn attach(&mut self, source: u32, owner: Arc<dyn Source>) {
        let index = usize::try_from(source).expect("u32 fits");
        self.sources[index] = Some(owner);
    }

    /// Serves until the machine and all branches have ended.
    pub fn run(&mut self) -> io::Result<()> {
        let result = self.serve_all();
        self.branches.join();
        result
    }

    fn serve_all(&self) -> io::Result<()> {
        let mut batch = [EpollEvent::default(); BATCH];
        let mut wakefulness = Wakefulness::default();
        let mut busy = Vec::new();
        while !self.is_over() {
            self.serve(FOREVER, &mut batch, &mut busy)?;
            if !busy.is_empty() {
                wakefulness.wake(Instant::now());
                let found = self.stay_awake(wakefulness.window(), &mut batch, &mut busy)?;
                wakefulness.sleep(Instant::now(), found);
                busy.clear();
            }
        }
        Ok(())
    }

    /// Looks after `busy` sources until there was nothing to do for as long as `window`. Returns
    /// whether there was something before that.
    fn stay_awake(
        &self,
        window: Duration,
        batch: &mut [EpollEvent],
        busy: &mut Vec<Arc<dyn Source>>,
    ) -> io::Result<bool> {
        let mut found = false;
        let mut worked_at = Instant::now();
        let mut served_at = worked_at;
        while !self.is_over() {
            // All of them, not up to the first.
            let worked = busy.iter().filter(|source| source.poll()).count() > 0;
            let now = Instant::now();
            if now.duration_since(served_at) >= OTHERS_EVERY {
                self.serve(NOT_AT_ALL, batch, busy)?;
                served_at = now;
            }
            if worked {
                found = true;
                worked_at = now;
            } else if now.duration_since(worked_at) < window {
                hint::spin_loop();
            } else if busy.iter().filter(|source| source.rest()).count() == 0 {
                break;
            }
        }
        Ok(found)
    }

    /// Hands out readiness; sources that are worth looking after are `busy` from then on.
    fn serve(
        &self,
        timeout: i32,
        batch: &mut [EpollEvent],
        busy: &mut Vec<Arc<dyn Source>>,
    ) -> io::Result<()> {
        let count = match self.poller.epoll.wait(timeout, batch) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &batch[..count] {
            if let Some(source) = self.dispatch(*event)
                && !busy.iter().any(|other| Arc::ptr_eq(other, source))
            {
                busy.push(source.clone());
            }
        }
        Ok(())
    }

    /// Returns the owner if it is worth looking after.
    fn dispatch(&self, event: EpollEvent) -> Option<&Arc<dyn Source>> {
        let [source, token] = [event.data() >> 32, event.data() & 0xffff_ffff]
            .map(|half| u32::try_from(half).expect("half of 64 bits"));
        let owner = usize::try_from(source)
            .ok()
            .and_then(|index| self.sources.get(index))?
            .as_ref()?;
        let closed = event
            .event_set()
            .intersects(EventSet::HANG_UP | EventSet::ERROR);
        owner.on_ready(
            token,
            Readiness {
                readable: closed || event.event_set().contains(EventSet::IN),
                writable: closed || event.event_set().contains(EventSet::OUT),
            },
        );
        owner.busy().then_some(owner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    use super::*;
    use crate::control::{ExitReason, ExitStatus};

    struct Owner {
        seen: Mutex<Vec<(u32, Readiness)>>,
        event: EventFd,
        exit: ExitSwitch,
    }

    impl Source for Owner {
        fn on_ready(&self, token: u32, readiness: Readiness) {
            self.event.read().unwrap();
            self.seen.lock().unwrap().push((token, readiness));
            self.exit.end(ExitStatus::new(ExitReason::Reset));
        }
    }

    /// Expects certain calls, and answers each.
    struct Busy {
        event: EventFd,
        exit: ExitSwitch,
        left: Mutex<Vec<&'static str>>,
    }

    impl Busy {
        fn expect(&self, step: &str) -> bool {
            let mut left = self.left.lock().unwrap();
            let (name, more) = left.remove(0).split_once(' ').unwrap();
            assert_eq!(name, step);
            if left.is_empty() {
                self.exit.end(ExitStatus::new(ExitReason::Reset));
            }
            more == "more"
        }
    }

    impl Source for Busy {
        fn on_ready(&self, _token: u32, _readiness: Readiness) {
            self.event.read().unwrap();
        }

        fn busy(&self) -> bool {
            self.expect("busy")
        }

        fn poll(&self) -> bool {
            self.expect("poll")
        }

        fn rest(&self) -> bool {
            self.expect("rest")
        }
    }

    #[test]
    fn a_busy_source_is_looked_after_until_it_rests_without_more_work() {
        let exit = ExitSwitch::new().unwrap();
        let mut events = EventLoop::new(exit.clone()).unwrap();
        let source = events.reserve();
        let steps = [
            "busy more",
            "poll more",
            "poll none",
            "rest more",
            "poll none",
            "rest none",
        ];
        let owner = Arc::new(Busy {
            event: event().unwrap(),
            exit,
            left: Mutex::new(steps.to_vec()),
        });
        owner.event.write(1).unwrap();
        let fd = owner.event.as_raw_fd();
        let poller = events.poller();
        poller.add(source, 0, fd, Readiness::READABLE).unwrap();
        events.attach(source, owner.clone());
        events.run().unwrap();
        assert_eq!(*owner.left.lock().unwrap(), [""; 0]);
    }

    #[test]
    fn readiness_reaches_the_owner_and_the_loop_ends_with_the_machine() {
        let exit = ExitSwitch::new().unwrap();
        let mut events = EventLoop::new(exit.clone()).unwrap();
        let _other = events.reserve();
        let source = events.reserve();
        let owner = Arc::new(Owner {
            seen: Mutex::default(),
            event: event().unwrap(),
            exit,
        });
        owner.event.write(1).unwrap();
        let fd = owner.event.as_raw_fd();
        events
            .poller()
            .add(source, 7, fd, Readiness::READABLE)
            .unwrap();
        events.attach(source, owner.clone());
        events.run().unwrap();
        assert_eq!(*owner.seen.lock().unwrap(), [(7, Readiness::READABLE)]);
    }
}
