//! What must survive hostd: instances, their snapshots and events, in SQLite.
//!
//! A change of an instance and the event that tells of it are one transaction. The store is asked
//! from async code only through [`Store::run`], on a thread that may wait for the disk.

mod schema;
mod snapshots;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task;

use crate::api::types::{Event, Instance};

pub use self::snapshots::{add_snapshot, remove_snapshot, snapshot, snapshots};

/// Older events are dropped, so that the history is bounded.
pub const EVENTS_KEPT_MAX: u64 = 10_000;

/// An instance as stored: its public face and what only hostd needs to know.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Record {
    /// `pid` is never stored: whether something runs is observed, not remembered.
    pub instance: Instance,
    /// Unique among the instances that are; the VMM's uid is made from it.
    pub index: u32,
    /// Removal has begun, and is to be finished whatever happens.
    pub removing: bool,
    /// The spec's limits have been stored but may not be in force yet.
    pub unapplied: bool,
    /// hostd is making it stand still, or has done so for a snapshot, whatever its state says.
    #[serde(default)]
    pub held: bool,
    /// Its next start goes on from the memory of a snapshot.
    #[serde(default)]
    pub goes_on: bool,
}

/// Something that happened, before it has a sequence number.
#[derive(Clone, Debug, PartialEq)]
pub struct Happening {
    pub kind: &'static str,
    pub subject: String,
    pub data: serde_json::Value,
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("there is an instance `{0}` already")]
    NameTaken(String),
    #[error("the database failed")]
    Database(#[from] rusqlite::Error),
    #[error("the database has schema version {found}, this hostd knows up to {known}")]
    TooNew { found: i64, known: i64 },
    #[error("the record of `{name}` cannot be read")]
    Malformed {
        name: String,
        source: serde_json::Error,
    },
}

/// A handle to the database; clones share one connection.
#[derive(Clone, Debug)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
}

impl Store {
    /// Opens the database at `path`, making or upgrading it as needed.
    ///
    /// # Errors
    /// It cannot be opened, or was written by a newer hostd.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let mut connection = Connection::open(path)?;
        // An accepted request must not be forgotten in a power failure, hence FULL.
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", true)?;
        schema::upgrade(&mut connection)?;
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
        })
    }

    /// Runs `work` on a thread that may block.
    ///
    /// # Errors
    /// What `work` fails with.
    ///
    /// # Panics
    /// If `work` does.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.connection);
        task::spawn_blocking(move || {
            // A panic while the lock was held rolled its transaction back, so what is there is sound.
            let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            work(&mut connection)
        })
        .await
        .expect("the store's work does not panic")
    }
}

/// All instances, by name.
///
/// # Errors
/// The database fails, or holds what is no record.
pub fn instances(connection: &Connection) -> Result<Vec<Record>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT name, body FROM instances ORDER BY name")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let mut records = Vec::new();
    for row in rows {
        let (name, body): (String, String) = row?;
        let mut record: Record = parse(&name, &body)?;
        record.instance.snapshots = snapshots::names(connection, &name)?;
        records.push(record);
    }
    Ok(records)
}

fn parse<T: DeserializeOwned>(name: &str, body: &str) -> Result<T, StoreError> {
    serde_json::from_str(body).map_err(|source| StoreError::Malformed {
        name: name.to_owned(),
        source,
    })
}

/// Adds an instance with the lowest index that is free, and tells of it.
///
/// # Errors
/// The name is taken, or the database fails.
pub fn insert(
    connection: &mut Connection,
    instance: Instance,
) -> Result<(Record, u64), StoreError> {
    add(connection, instance, false)
}

/// Adds an instance of which something is still missing: the next hostd removes it, unless an update
/// has said before that it is complete (`removing` no longer set).
///
/// # Errors
/// As `insert`.
pub fn insert_unfinished(
    connection: &mut Connection,
    instance: Instance,
) -> Result<(Record, u64), StoreError> {
    add(connection, instance, true)
}

fn add(
    connection: &mut Connection,
    instance: Instance,
    removing: bool,
) -> Result<(Record, u64), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let taken: Option<i64> = transaction
        .query_row(
            "SELECT 1 FROM instances WHERE name = ?1",
            [&instance.name],
            |row| row.get(0),
        )
        .optional()?;
    if taken.is_some() {
        return Err(StoreError::NameTaken(instance.name));
    }
    let index = transaction.query_row(
        "SELECT coalesce(min(candidate), 0) FROM (
             SELECT 0 AS candidate UNION ALL SELECT number + 1 FROM instances
         ) WHERE candidate NOT IN (SELECT number FROM instances)",
        [],
        |row| row.get(0),
    )?;
    let record = Record {
        instance,
        index,
        removing,
        unapplied: false,
        held: false,
        goes_on: false,
    };
    transaction.execute(
        "INSERT INTO instances (name, number, body) VALUES (?1, ?2, ?3)",
        params![record.instance.name, record.index, body(&record)],
    )?;
    let happening = Happening {
        kind: "instance.created",
        subject: record.instance.name.clone(),
        data: serde_json::json!({"isolation": record.instance.spec.isolation}),
    };
    let sequence = append(&transaction, &happening)?;
    transaction.commit()?;
    Ok((record, sequence))
}

/// Stores a change of an instance and, with it, the event that tells of it.
///
/// # Errors
/// The database fails; nothing has changed then.
pub fn update(
    connection: &mut Connection,
    record: &Record,
    happening: Option<&Happening>,
) -> Result<Option<u64>, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute(
        "UPDATE instances SET body = ?2 WHERE name = ?1",
        params![record.instance.name, body(record)],
    )?;
    let sequence = happening
        .map(|happening| append(&transaction, happening))
        .transpose()?;
    transaction.commit()?;
    Ok(sequence)
}

/// Forgets an instance and tells of it. Doing it twice is doing it once.
///
/// # Errors
/// The database fails; nothing has changed then.
pub fn remove(connection: &mut Connection, name: &str) -> Result<Option<u64>, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    transaction.execute("DELETE FROM snapshots WHERE instance = ?1", [name])?;
    let removed = transaction.execute("DELETE FROM instances WHERE name = ?1", [name])?;
    let sequence = if removed == 0 {
        None
    } else {
        let happening = Happening {
            kind: "instance.removed",
            subject: name.to_owned(),
            data: serde_json::json!({}),
        };
        Some(append(&transaction, &happening)?)
    };
    transaction.commit()?;
    Ok(sequence)
}

/// Adds an event that belongs to no instance's change.
///
/// # Errors
/// The database fails.
pub fn record(connection: &mut Connection, happening: &Happening) -> Result<u64, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let sequence = append(&transaction, happening)?;
    transaction.commit()?;
    Ok(sequence)
}

fn append(connection: &Connection, happening: &Happening) -> Result<u64, StoreError> {
    connection
        .prepare_cached("INSERT INTO events (at, kind, subject, data) VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![
            Timestamp::now().to_string(),
            happening.kind,
            happening.subject,
            happening.data.to_string(),
        ])?;
    let sequence = u64::try_from(connection.last_insert_rowid()).expect("sequences start at 1");
    connection
        .prepare_cached("DELETE FROM events WHERE sequence <= ?1")?
        .execute([sequence.saturating_sub(EVENTS_KEPT_MAX)])?;
    Ok(sequence)
}

/// Events after `since`, at most `count`, oldest first.
///
/// # Errors
/// The database fails.
pub fn events(connection: &Connection, since: u64, count: usize) -> Result<Vec<Event>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT sequence, at, kind, subject, data FROM events
         WHERE sequence > ?1 ORDER BY sequence LIMIT ?2",
    )?;
    let rows = statement.query_map(params![since, count], event)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The sequence number of the newest event, 0 before the first.
///
/// # Errors
/// The database fails.
pub fn last_sequence(connection: &Connection) -> Result<u64, StoreError> {
    Ok(connection.query_row(
        "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'",
        [],
        |row| row.get(0),
    )?)
}

fn event(row: &Row<'_>) -> Result<Event, rusqlite::Error> {
    let at: String = row.get(1)?;
    let data: String = row.get(4)?;
    Ok(Event {
        sequence: row.get(0)?,
        at: at.parse().unwrap_or_default(),
        kind: row.get(2)?,
        subject: row.get(3)?,
        data: serde_json::from_str(&data).unwrap_or_default(),
    })
}

fn body(record: &Record) -> String {
    let mut record = record.clone();
    record.instance.pid = None;
    // They have a table of their own.
    record.instance.snapshots.clear();
    serde_json::to_string(&record).expect("a record has only string keys and plain values")
}

#[cfg(test)]
mod tests;
