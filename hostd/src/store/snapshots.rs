//! The snapshots of instances. Each goes with its instance.

use rusqlite::{Connection, OptionalExtension, TransactionBehavior, params};
use serde_json::json;

use super::{Happening, Record, StoreError, append, body, parse};
use crate::api::types::Snapshot;

/// The snapshots of an instance, the oldest first.
///
/// # Errors
/// The database fails, or holds what is no snapshot.
pub fn snapshots(connection: &Connection, instance: &str) -> Result<Vec<Snapshot>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT name, body FROM snapshots WHERE instance = ?1 ORDER BY number")?;
    let rows = statement.query_map([instance], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.map(|row| {
        let (name, body): (String, String) = row?;
        parse(&name, &body)
    })
    .collect()
}

/// One snapshot, if there is one of that name.
///
/// # Errors
/// As [`snapshots`].
pub fn snapshot(
    connection: &Connection,
    instance: &str,
    name: &str,
) -> Result<Option<Snapshot>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT body FROM snapshots WHERE instance = ?1 AND name = ?2")?;
    let found: Option<String> = statement
        .query_row([instance, name], |row| row.get(0))
        .optional()?;
    found.map(|body| parse(name, &body)).transpose()
}

pub(super) fn names(connection: &Connection, instance: &str) -> Result<Vec<String>, StoreError> {
    let mut statement = connection
        .prepare_cached("SELECT name FROM snapshots WHERE instance = ?1 ORDER BY number")?;
    let rows = statement.query_map([instance], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Adds a snapshot of the instance, stores the instance with it, and tells of it.
///
/// # Errors
/// The database fails; nothing has changed then.
pub fn add_snapshot(
    connection: &mut Connection,
    record: &Record,
    snapshot: &Snapshot,
) -> Result<u64, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let text = serde_json::to_string(snapshot).expect("a snapshot has only plain values");
    transaction.execute(
        "INSERT INTO snapshots (instance, name, body) VALUES (?1, ?2, ?3)",
        params![snapshot.instance, snapshot.name, text],
    )?;
    transaction.execute(
        "UPDATE instances SET body = ?2 WHERE name = ?1",
        params![record.instance.name, body(record)],
    )?;
    let happening = Happening {
        kind: "snapshot.created",
        subject: snapshot.instance.clone(),
        data: json!({"snapshot": snapshot.name, "stateful": snapshot.stateful}),
    };
    let sequence = append(&transaction, &happening)?;
    transaction.commit()?;
    Ok(sequence)
}

/// Forgets a snapshot and tells of it; `None` if there is none of that name.
///
/// # Errors
/// The database fails; nothing has changed then.
pub fn remove_snapshot(
    connection: &mut Connection,
    instance: &str,
    name: &str,
) -> Result<Option<u64>, StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let removed = transaction.execute(
        "DELETE FROM snapshots WHERE instance = ?1 AND name = ?2",
        [instance, name],
    )?;
    if removed == 0 {
        return Ok(None);
    }
    let happening = Happening {
        kind: "snapshot.removed",
        subject: instance.to_owned(),
        data: json!({"snapshot": name}),
    };
    let sequence = append(&transaction, &happening)?;
    transaction.commit()?;
    Ok(Some(sequence))
}
