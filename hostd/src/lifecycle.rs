//! Which state an instance may go to. Pure: two functions, no effects, no clock.
//!
//! Requests may be refused, facts may not: what has happened has happened, whatever the state.

use crate::api::types::InstanceState;

/// What a client asks of an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Request {
    Start,
    Stop,
    Kill,
    Pause,
    Resume,
    Restart,
    Remove,
    Snapshot,
    Restore,
}

impl Request {
    /// The verb, as in the API's path.
    pub fn verb(self) -> &'static str {
        match self {
            Request::Start => "start",
            Request::Stop => "stop",
            Request::Kill => "kill",
            Request::Pause => "pause",
            Request::Resume => "resume",
            Request::Restart => "restart",
            Request::Remove => "remove",
            Request::Snapshot => "snapshot",
            Request::Restore => "restore",
        }
    }
}

/// What has been seen to happen to an instance.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fact {
    /// The start failed; nothing runs.
    StartFailed,
    /// The workload has been started.
    Ready,
    /// The workload has ended and said how.
    Ended,
    /// What ran the workload is gone and left no word.
    Lost,
}

/// What a granted request comes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Grant {
    /// The instance is in this state from now on, and the verb is to be carried out.
    Become(InstanceState),
    /// What was asked for already holds: a client that asks again has lost a reply.
    AlreadySo,
}

/// A request that the state does not allow.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("cannot {} an instance that is {}", .request.verb(), name(*.state))]
pub struct Refused {
    pub state: InstanceState,
    pub request: Request,
}

impl Refused {
    /// Whether the same request may be granted later without anything else being asked.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.state,
            InstanceState::Starting | InstanceState::Stopping
        )
    }

    /// What to do instead.
    pub fn remedy(&self) -> &'static str {
        match (self.state, self.request) {
            (_, Request::Remove) => "stop it first, or force it (`rm --force`, `?force=true`)",
            (InstanceState::Starting, _) => "wait until it runs and ask again",
            (InstanceState::Stopping, _) => "wait until it has stopped and ask again",
            _ => "start it first",
        }
    }
}

/// The state's name, as on the wire.
pub fn name(state: InstanceState) -> &'static str {
    match state {
        InstanceState::Created => "created",
        InstanceState::Starting => "starting",
        InstanceState::Running => "running",
        InstanceState::Paused => "paused",
        InstanceState::Stopping => "stopping",
        InstanceState::Stopped => "stopped",
        InstanceState::Failed => "failed",
    }
}

/// Whether something of the instance may be running.
pub fn is_live(state: InstanceState) -> bool {
    match state {
        InstanceState::Starting
        | InstanceState::Running
        | InstanceState::Paused
        | InstanceState::Stopping => true,
        InstanceState::Created | InstanceState::Stopped | InstanceState::Failed => false,
    }
}

/// What comes of a request.
///
/// # Errors
/// The state does not allow it.
pub fn request(state: InstanceState, request: Request) -> Result<Grant, Refused> {
    use InstanceState as S;
    use Request as R;
    match (state, request) {
        (S::Created | S::Stopped | S::Failed, R::Start | R::Restart) => {
            Ok(Grant::Become(S::Starting))
        }
        (S::Running, R::Pause) => Ok(Grant::Become(S::Paused)),
        (S::Paused, R::Resume) => Ok(Grant::Become(S::Running)),
        (S::Starting | S::Running | S::Paused, R::Stop | R::Kill | R::Restart)
        | (S::Stopping, R::Kill) => Ok(Grant::Become(S::Stopping)),
        (S::Created | S::Stopped | S::Failed, R::Remove | R::Restore)
        | (S::Created | S::Running | S::Paused | S::Stopped | S::Failed, R::Snapshot) => {
            Ok(Grant::Become(state))
        }
        (S::Running | S::Paused, R::Restore) => Ok(Grant::Become(S::Stopping)),

        (S::Starting | S::Running | S::Paused, R::Start)
        | (S::Paused, R::Pause)
        | (S::Running, R::Resume)
        | (S::Created | S::Stopping | S::Stopped | S::Failed, R::Stop)
        | (S::Created | S::Stopped | S::Failed, R::Kill) => Ok(Grant::AlreadySo),

        (state, request) => Err(Refused { state, request }),
    }
}

/// What the instance is, now that `fact` has happened.
pub fn observe(state: InstanceState, fact: Fact) -> InstanceState {
    use InstanceState as S;
    match (state, fact) {
        (S::Starting, Fact::Ready) => S::Running,
        (state, Fact::Ready) => state,
        (S::Stopping, Fact::StartFailed | Fact::Lost) | (_, Fact::Ended) => S::Stopped,
        (_, Fact::StartFailed | Fact::Lost) => S::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole machine: read by people, checked by the computer. A dot is a refusal, an equals
    /// sign means that it already holds.
    const TABLE: &str = "
             | start    stop     kill     pause  resume  restart  remove  snapshot restore  | start_failed ready    ended   lost
    created  | starting =        =        .      .       starting created created  created  | failed       created  stopped failed
    starting | =        stopping stopping .      .       stopping .       .        .        | failed       running  stopped failed
    running  | =        stopping stopping paused =       stopping .       running  stopping | failed       running  stopped failed
    paused   | =        stopping stopping =      running stopping .       paused   stopping | failed       paused   stopped failed
    stopping | .        =        stopping .      .       .        .       .        .        | stopped      stopping stopped stopped
    stopped  | starting =        =        .      .       starting stopped stopped  stopped  | failed       stopped  stopped failed
    failed   | starting =        =        .      .       starting failed  failed   failed   | failed       failed   stopped failed
    ";

    const STATES: [InstanceState; 7] = [
        InstanceState::Created,
        InstanceState::Starting,
        InstanceState::Running,
        InstanceState::Paused,
        InstanceState::Stopping,
        InstanceState::Stopped,
        InstanceState::Failed,
    ];
    const REQUESTS: [Request; 9] = [
        Request::Start,
        Request::Stop,
        Request::Kill,
        Request::Pause,
        Request::Resume,
        Request::Restart,
        Request::Remove,
        Request::Snapshot,
        Request::Restore,
    ];
    const FACTS: [Fact; 4] = [Fact::StartFailed, Fact::Ready, Fact::Ended, Fact::Lost];

    #[test]
    fn the_table_is_what_the_two_functions_do() {
        let rows: Vec<&str> = TABLE
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        for (row, state) in rows.iter().skip(1).zip(STATES) {
            let cells: Vec<&str> = row.split_whitespace().filter(|cell| *cell != "|").collect();
            assert_eq!(cells[0], name(state));
            for (cell, asked) in cells[1..10].iter().zip(REQUESTS) {
                let got = match request(state, asked) {
                    Ok(Grant::Become(next)) => name(next),
                    Ok(Grant::AlreadySo) => "=",
                    Err(_) => ".",
                };
                assert_eq!(got, *cell, "{} asked to {}", name(state), asked.verb());
            }
            for (cell, fact) in cells[10..].iter().zip(FACTS) {
                assert_eq!(
                    name(observe(state, fact)),
                    *cell,
                    "{} and {fact:?}",
                    name(state)
                );
            }
        }
    }
}
