//! Tests of the store: what is accepted stays, what is cut off leaves no half.

use std::fs;

use tempfile::TempDir;

use super::*;
use crate::api::types::{InstanceSpec, InstanceState};

fn instance(name: &str) -> Instance {
    Instance {
        name: name.to_owned(),
        state: InstanceState::Created,
        reason: None,
        exit: None,
        error: None,
        spec: InstanceSpec::default(),
        image_digest: String::new(),
        pid: Some(7),
        address: None,
        created_at: Timestamp::UNIX_EPOCH,
        started_at: None,
        finished_at: None,
        start_us: Default::default(),
        snapshots: Vec::new(),
        generation: 1,
    }
}

fn open(dir: &TempDir) -> Connection {
    let path = dir.path().join("db");
    let store = Store::open(&path).unwrap();
    drop(store);
    Connection::open(path).unwrap()
}

#[test]
fn a_name_is_given_once() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    insert(&mut connection, instance("a")).unwrap();
    let again = insert(&mut connection, instance("a")).unwrap_err();
    assert!(matches!(again, StoreError::NameTaken(name) if name == "a"));
}

#[test]
fn indexes_are_the_lowest_that_are_free() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    for (name, index) in [("a", 0), ("b", 1), ("c", 2)] {
        assert_eq!(
            insert(&mut connection, instance(name)).unwrap().0.index,
            index
        );
    }
    remove(&mut connection, "b").unwrap();
    assert_eq!(insert(&mut connection, instance("d")).unwrap().0.index, 1);
    remove(&mut connection, "a").unwrap();
    assert_eq!(insert(&mut connection, instance("e")).unwrap().0.index, 0);
}

#[test]
fn a_pid_is_not_remembered() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    insert(&mut connection, instance("a")).unwrap();
    assert_eq!(instances(&connection).unwrap()[0].instance.pid, None);
}

#[test]
fn sequences_go_on_after_old_events_are_dropped_and_the_database_is_reopened() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    let happening = Happening {
        kind: "test",
        subject: "a".to_owned(),
        data: serde_json::Value::Null,
    };
    connection
        .pragma_update(None, "synchronous", "OFF")
        .unwrap();
    let transaction = connection.transaction().unwrap();
    for _ in 0..EVENTS_KEPT_MAX + 5 {
        append(&transaction, &happening).unwrap();
    }
    transaction.commit().unwrap();
    let oldest = events(&connection, 0, 1).unwrap()[0].sequence;
    assert_eq!(oldest, 6);
    connection.execute("DELETE FROM events", []).unwrap();
    drop(connection);

    let mut connection = open(&dir);
    assert_eq!(last_sequence(&connection).unwrap(), EVENTS_KEPT_MAX + 5);
    assert_eq!(
        record(&mut connection, &happening).unwrap(),
        EVENTS_KEPT_MAX + 6
    );
}

#[test]
fn a_change_cut_off_before_its_commit_is_no_change() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    let (mut changed, _) = insert(&mut connection, instance("a")).unwrap();
    changed.instance.state = InstanceState::Running;

    // The files as a crash would leave them: written, but without the commit.
    let transaction = connection.transaction().unwrap();
    transaction
        .execute("UPDATE instances SET body = ?1", [body(&changed)])
        .unwrap();
    let copy = TempDir::new().unwrap();
    for name in ["db", "db-wal"] {
        fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
    }
    let found = instances(&open(&copy)).unwrap();
    assert_eq!(found[0].instance.state, InstanceState::Created);
}

#[test]
fn a_commit_survives_a_crash_that_loses_the_shared_memory() {
    let dir = TempDir::new().unwrap();
    let mut connection = open(&dir);
    let (mut changed, _) = insert(&mut connection, instance("a")).unwrap();
    changed.instance.state = InstanceState::Running;
    update(&mut connection, &changed, None).unwrap();
    let copy = TempDir::new().unwrap();
    for name in ["db", "db-wal"] {
        fs::copy(dir.path().join(name), copy.path().join(name)).unwrap();
    }
    let found = instances(&open(&copy)).unwrap();
    assert_eq!(found[0].instance.state, InstanceState::Running);
}

#[test]
fn a_database_of_a_newer_hostd_is_left_alone() {
    let dir = TempDir::new().unwrap();
    let connection = open(&dir);
    connection.pragma_update(None, "user_version", 99).unwrap();
    let error = Store::open(&dir.path().join("db")).unwrap_err();
    assert!(matches!(
        error,
        StoreError::TooNew {
            found: 99,
            known: 2
        }
    ));
}
