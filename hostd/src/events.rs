//! What happened, told in order: a history in the store and a signal that it has grown.
//!
//! Listeners read the history at their own pace, so a slow one costs no memory and misses nothing
//! but what is older than the store keeps.

use tokio::sync::watch;

use crate::api::types::Event;
use crate::store::{self, Happening, Store, StoreError};

/// Events read from the store at a time.
const BATCH_LEN: usize = 256;

/// The history of this host. Clones share it.
#[derive(Clone, Debug)]
pub struct Events {
    store: Store,
    /// The sequence number of the newest event.
    newest: watch::Sender<u64>,
}

impl Events {
    /// # Errors
    /// The store fails.
    pub async fn open(store: Store) -> Result<Self, StoreError> {
        let last = store
            .run(|connection| store::last_sequence(connection))
            .await?;
        Ok(Self {
            store,
            newest: watch::Sender::new(last),
        })
    }

    /// Wakes the listeners for an event that the store has taken.
    pub fn announce(&self, sequence: u64) {
        self.newest.send_if_modified(|newest| {
            let grown = sequence > *newest;
            *newest = sequence.max(*newest);
            grown
        });
    }

    /// Stores an event that belongs to no instance's change, and announces it.
    ///
    /// # Errors
    /// The store fails.
    pub async fn tell(&self, happening: Happening) -> Result<(), StoreError> {
        let sequence = self
            .store
            .run(move |connection| store::record(connection, &happening))
            .await?;
        self.announce(sequence);
        Ok(())
    }

    /// Listens to what comes after the event `since`, or from now on.
    pub fn listen(&self, since: Option<u64>) -> Listener {
        let newest = self.newest.subscribe();
        let last = since.unwrap_or_else(|| *newest.borrow());
        Listener {
            store: self.store.clone(),
            newest,
            last,
            follow: true,
        }
    }
}

/// One listener's place in the history.
#[derive(Debug)]
pub struct Listener {
    store: Store,
    newest: watch::Receiver<u64>,
    last: u64,
    follow: bool,
}

impl Listener {
    /// The same listener, which does not wait.
    #[must_use]
    pub fn up_to_now(self) -> Self {
        Self {
            follow: false,
            ..self
        }
    }

    /// The next events, at least one, waiting for them; none at the end of a listener up to now.
    ///
    /// # Errors
    /// The store fails.
    pub async fn next(&mut self) -> Result<Vec<Event>, StoreError> {
        loop {
            self.newest.borrow_and_update();
            let since = self.last;
            let batch = self
                .store
                .run(move |connection| store::events(connection, since, BATCH_LEN))
                .await?;
            if let Some(event) = batch.last() {
                self.last = event.sequence;
                return Ok(batch);
            }
            if !self.follow {
                return Ok(batch);
            }
            if self.newest.changed().await.is_err() {
                // hostd is going; there will be no more.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::TempDir;

    use super::*;

    fn happening(number: u64) -> Happening {
        Happening {
            kind: "test",
            subject: number.to_string(),
            data: json!({}),
        }
    }

    #[tokio::test]
    async fn a_listener_hears_the_past_it_asks_for_and_then_the_present_in_order() {
        let dir = TempDir::new().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let events = Events::open(store).await.unwrap();
        for number in 1..=3 {
            events.tell(happening(number)).await.unwrap();
        }
        let mut past = events.listen(Some(1));
        let mut present = events.listen(None);
        events.tell(happening(4)).await.unwrap();

        let heard: Vec<u64> = past
            .next()
            .await
            .unwrap()
            .iter()
            .map(|event| event.sequence)
            .collect();
        assert_eq!(heard, [2, 3, 4]);
        let heard = present.next().await.unwrap();
        assert_eq!((heard.len(), heard[0].subject.as_str()), (1, "4"));
    }

    #[tokio::test]
    async fn a_waiting_listener_is_woken() {
        let dir = TempDir::new().unwrap();
        let store = Store::open(&dir.path().join("db")).unwrap();
        let events = Events::open(store).await.unwrap();
        let mut listener = events.listen(None);
        let waiting = tokio::spawn(async move { listener.next().await.unwrap().len() });
        events.tell(happening(1)).await.unwrap();
        assert_eq!(waiting.await.unwrap(), 1);
    }
}
