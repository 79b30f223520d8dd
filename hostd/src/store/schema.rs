//! The database's schema, version by version.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// Each entry takes the schema from the version that is its index to the next one. Entries are
/// only ever added.
const STEPS: &[&str] = &[
    "
    CREATE TABLE instances (
        name TEXT PRIMARY KEY,
        number INTEGER NOT NULL UNIQUE,
        body TEXT NOT NULL
    ) STRICT;
    CREATE TABLE events (
        sequence INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL,
        kind TEXT NOT NULL,
        subject TEXT NOT NULL,
        data TEXT NOT NULL
    ) STRICT;
",
    "
    CREATE TABLE snapshots (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        instance TEXT NOT NULL REFERENCES instances (name) ON DELETE CASCADE,
        name TEXT NOT NULL,
        body TEXT NOT NULL,
        UNIQUE (instance, name)
    ) STRICT;
",
];

/// Brings the database to this hostd's schema; all or nothing.
pub(super) fn upgrade(connection: &mut Connection) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = i64::try_from(STEPS.len()).expect("few steps");
    let done = usize::try_from(found)
        .ok()
        .filter(|done| *done <= STEPS.len())
        .ok_or(StoreError::TooNew { found, known })?;
    for step in &STEPS[done..] {
        transaction.execute_batch(step)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    transaction.commit()?;
    Ok(())
}
