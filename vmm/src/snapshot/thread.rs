//! A thread that writes snapshots, so that the machine answers its clients meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::file::Kind;
use super::take::{Snapshotter, TakeError};
use crate::control::SnapshotReport;
use crate::events::event;

/// A snapshot to be taken.
#[derive(Debug)]
pub struct Order {
    pub kind: Kind,
    /// Empty, as is the other.
    pub state: File,
    pub memory: File,
}

/// A snapshot is being written; there is one at a time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Busy;

/// What came of an order.
pub type Taken = Result<SnapshotReport, TakeError>;

/// The thread. It ends when this is dropped, which waits for it; once the machine has ended, that is
/// not long.
#[derive(Debug)]
pub struct SnapshotThread {
    orders: Option<Sender<Order>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Not the thread's alone: it may not do all that the end of devices takes.
    _snapshotter: Arc<Snapshotter>,
}

#[derive(Debug)]
struct Shared {
    progress: Mutex<Progress>,
    /// Readable when there is a result.
    done: EventFd,
}

#[derive(Debug)]
enum Progress {
    Idle,
    Busy,
    Done(Taken),
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().expect("nothing panics in here")
    }

    fn finish(&self, taken: Taken) {
        *self.lock() = Progress::Done(taken);
        // A full counter wakes as well as a written one.
        let _ = self.done.write(1);
    }
}

impl SnapshotThread {
    /// Starts it. `enter` runs first.
    ///
    /// # Errors
    ///
    /// If the host has no thread or event to give.
    pub fn start(
        snapshotter: Snapshotter,
        enter: Arc<dyn Fn() + Send + Sync>,
    ) -> io::Result<SnapshotThread> {
        let shared = Arc::new(Shared {
            progress: Mutex::new(Progress::Idle),
            done: event()?,
        });
        let (orders, received) = channel();
        let snapshotter = Arc::new(snapshotter);
        let (theirs, taker) = (shared.clone(), snapshotter.clone());
        let thread = thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || {
                enter();
                serve(&taker, &received, &theirs);
            })?;
        Ok(SnapshotThread {
            orders: Some(orders),
            shared,
            thread: Some(thread),
            _snapshotter: snapshotter,
        })
    }

    /// Begins to take a snapshot.
    ///
    /// # Errors
    ///
    /// If the last one is still being taken, or nobody has asked what came of it.
    pub fn begin(&self, order: Order) -> Result<(), Busy> {
        let mut progress = self.shared.lock();
        let (Progress::Idle, Some(orders)) = (&*progress, &self.orders) else {
            return Err(Busy);
        };
        *progress = Progress::Busy;
        // The thread is there as long as this is.
        orders.send(order).map_err(|_| Busy)
    }

    /// Whether one is being taken.
    pub fn busy(&self) -> bool {
        !matches!(*self.shared.lock(), Progress::Idle)
    }

    /// Readable when [`take_result`](Self::take_result) has something.
    pub fn done_fd(&self) -> RawFd {
        self.shared.done.as_raw_fd()
    }

    /// What came of the last order, once.
    pub fn take_result(&self) -> Option<Taken> {
        // Readable or not: it is only being made unreadable.
        let _ = self.shared.done.read();
        let mut progress = self.shared.lock();
        if !matches!(*progress, Progress::Done(_)) {
            return None;
        }
        match std::mem::replace(&mut *progress, Progress::Idle) {
            Progress::Done(taken) => Some(taken),
            Progress::Idle | Progress::Busy => None,
        }
    }
}

impl Drop for SnapshotThread {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn serve(snapshotter: &Snapshotter, orders: &Receiver<Order>, shared: &Shared) {
    for mut order in orders {
        let taken = snapshotter.take(order.kind, &mut order.state, &mut order.memory);
        // Whoever hears of it may open them at once.
        drop(order);
        shared.finish(taken);
    }
}
