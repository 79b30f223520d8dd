//! Who is at work on what: one maker for each thing, and no removal of what is being used.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

use super::layout::Digest;
use super::manifest::Layer;

/// A thing of the store, as it is claimed: its directory and its name there.
pub(super) fn blob(digest: &Digest) -> String {
    format!("blobs/{}", digest.hex())
}

pub(super) fn layer(layer: &Layer) -> String {
    format!("layers/{}", layer.directory())
}

pub(super) fn disk(digest: &Digest) -> String {
    format!("disks/{}", digest.hex())
}

/// Lets only one at a time make a thing; the others wait and then find it made.
#[derive(Debug, Default)]
pub(super) struct Makers {
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Makers {
    pub(super) async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            match locks.get(name).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::default();
                    locks.insert(name.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

/// Things that garbage collection must leave, since an operation relies on them.
#[derive(Clone, Debug, Default)]
pub(super) struct Holds {
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// Keeps things from being collected as garbage while it lives.
#[derive(Debug)]
pub(super) struct Hold {
    holds: Holds,
    names: Vec<String>,
}

/// While it lives, nobody can begin or end a hold.
pub(super) struct Frozen<'a> {
    counts: MutexGuard<'a, HashMap<String, usize>>,
}

impl Holds {
    pub(super) fn hold(&self) -> Hold {
        Hold {
            holds: self.clone(),
            names: Vec::new(),
        }
    }

    pub(super) fn freeze(&self) -> Frozen<'_> {
        Frozen {
            counts: self.counts.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl Hold {
    pub(super) fn add(&mut self, name: impl Into<String>) {
        let name = name.into();
        *self.holds.freeze().counts.entry(name.clone()).or_default() += 1;
        self.names.push(name);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let counts = &mut self.holds.freeze().counts;
        for name in &self.names {
            if let Some(count) = counts.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(name);
                }
            }
        }
    }
}

impl Frozen<'_> {
    pub(super) fn names(&self) -> HashSet<&str> {
        self.counts.keys().map(String::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_until_its_last_holder_is_gone() {
        let holds = Holds::default();
        let (mut one, mut two) = (holds.hold(), holds.hold());
        one.add("a");
        two.add("a");
        two.add("b");
        drop(one);
        assert_eq!(holds.freeze().names(), HashSet::from(["a", "b"]));
        drop(two);
        assert!(holds.freeze().names().is_empty());
    }

    #[tokio::test]
    async fn the_second_maker_waits_for_the_first() {
        let makers = Makers::default();
        let first = makers.lock("a").await;
        let _other = makers.lock("b").await;
        let mut second = Box::pin(makers.lock("a"));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        let _second = second.await;
    }
}
