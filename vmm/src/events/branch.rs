//! Loops on threads of their own. What blocks there, such as a slow disk, holds nothing else up, and
//! what keeps one busy leaves the others their time.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::EventLoop;

/// The branches of a loop: to be started, and started.
#[derive(Default)]
pub(super) struct Branches {
    waiting: Vec<(String, EventLoop)>,
    threads: Vec<JoinHandle<()>>,
}

impl Branches {
    /// Waits for all that were started.
    pub(super) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl EventLoop {
    /// A loop for sources of their own, which ends with the machine. Its thread, called `name`, is
    /// there after [`start_branches`](Self::start_branches).
    pub fn branch(&mut self, name: &str) -> io::Result<&mut EventLoop> {
        let branch = EventLoop::new(self.exit.clone())?;
        let waiting = &mut self.branches.waiting;
        waiting.push((name.to_owned(), branch));
        let (_, branch) = waiting.last_mut().expect("it was just put there");
        Ok(branch)
    }

    /// Whether there are branches to be started.
    pub fn has_branches(&self) -> bool {
        !self.branches.waiting.is_empty()
    }

    /// Starts a thread for each branch. `enter` runs first in each.
    pub fn start_branches(&mut self, enter: &Arc<dyn Fn() + Send + Sync>) -> io::Result<()> {
        for (name, mut branch) in self.branches.waiting.drain(..) {
            let enter = enter.clone();
            let thread = thread::Builder::new().name(name).spawn(move || {
                enter();
                if let Err(error) = branch.run() {
                    branch.exit.fail(&error);
                }
            })?;
            self.branches.threads.push(thread);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::{Readiness, Source, event};
    use super::*;
    use crate::control::{ExitReason, ExitStatus};
    use crate::exit::ExitSwitch;

    struct Owner {
        exit: ExitSwitch,
        thread: Mutex<Option<String>>,
    }

    impl Source for Owner {
        fn on_ready(&self, _token: u32, _readiness: Readiness) {
            *self.thread.lock().unwrap() = thread::current().name().map(str::to_owned);
            self.exit.end(ExitStatus::new(ExitReason::Reset));
        }
    }

    #[test]
    fn a_source_of_a_branch_is_served_on_its_thread() {
        let exit = ExitSwitch::new().unwrap();
        let mut events = EventLoop::new(exit.clone()).unwrap();
        let owner = Arc::new(Owner {
            exit,
            thread: Mutex::default(),
        });
        let kick = event().unwrap();
        let branch = events.branch("disk0").unwrap();
        let source = branch.reserve();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&kick);
        let poller = branch.poller();
        poller.add(source, 0, fd, Readiness::READABLE).unwrap();
        branch.attach(source, owner.clone());

        let entered = Arc::new(AtomicBool::default());
        let flag = entered.clone();
        let enter: Arc<dyn Fn() + Send + Sync> =
            Arc::new(move || flag.store(true, Ordering::SeqCst));
        events.start_branches(&enter).unwrap();
        kick.write(1).unwrap();
        events.run().unwrap();
        assert!(entered.load(Ordering::SeqCst));
        assert_eq!(owner.thread.lock().unwrap().as_deref(), Some("disk0"));
    }
}
