//! Asks a guest to stop its workload.

use std::path::Path;

use agent::protocol::Request as GuestRequest;
use nix::sys::signal::Signal;
use vmm::control::{Request as MachineRequest, Response as MachineResponse};

use super::{control, guest, machine};
use crate::driver::{DriverError, chain};

/// Asks the agent to signal the workload of this run, or where it cannot be asked presses the
/// machine's power button, at which the agent does the same.
pub(super) async fn ask(run: &Path, signal: Signal) -> Result<(), DriverError> {
    let request = GuestRequest::Signal {
        signal: signal as i32,
    };
    let Err(error) = guest::ask(&machine::agent_socket(run), &request).await else {
        return Ok(());
    };
    let socket = machine::control_socket(run);
    let state = control::ask(&socket, &MachineRequest::State {}).await?;
    // Before its workload runs, nothing in the guest hears a press.
    if !matches!(state, MachineResponse::State { ready: true, .. }) {
        return Err(error);
    }
    tracing::warn!(
        run = %run.display(),
        error = chain(&error),
        "the agent cannot be asked to stop the workload; the power button is pressed"
    );
    let pressed = control::ask(&socket, &MachineRequest::PowerButton {}).await;
    pressed.map(|_| ())
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;
    use tokio::task::JoinHandle;

    use super::*;

    /// A VMM whose guest has been ready or has not; it tells which requests it had, in the end.
    fn vmm(run: &Path, ready: bool, clients: usize) -> JoinHandle<Vec<MachineRequest>> {
        let listener = UnixListener::bind(machine::control_socket(run)).unwrap();
        tokio::spawn(async move {
            let mut requests = Vec::new();
            for _ in 0..clients {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                let request: MachineRequest = serde_json::from_str(&line).unwrap();
                let answer = if request == (MachineRequest::State {}) {
                    format!(r#"{{"result":"state","state":"running","ready":{ready}}}"#)
                } else {
                    r#"{"result":"done"}"#.to_owned()
                };
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.write_all(b"\n").await.unwrap();
                requests.push(request);
            }
            requests
        })
    }

    #[tokio::test]
    async fn the_button_is_pressed_where_the_agent_cannot_be_asked_and_a_workload_runs() {
        let table = [
            (
                true,
                vec![MachineRequest::State {}, MachineRequest::PowerButton {}],
            ),
            (false, vec![MachineRequest::State {}]),
        ];
        for (ready, requests) in table {
            let run = TempDir::new().unwrap();
            let vmm = vmm(run.path(), ready, requests.len());
            let asked = ask(run.path(), Signal::SIGTERM).await;
            assert_eq!(asked.is_ok(), ready, "{asked:?}");
            assert_eq!(vmm.await.unwrap(), requests);
        }
    }

    #[tokio::test]
    async fn a_machine_that_is_not_there_cannot_be_asked() {
        let run = TempDir::new().unwrap();
        assert!(ask(run.path(), Signal::SIGTERM).await.is_err());
    }
}
