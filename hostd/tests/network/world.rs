//! A host, an outside and instances to test with.

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::resume_unwind;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hostd::api::types::{NetworkLimits, PortSpec, Protocol};
use hostd::network::{AttachRequest, Endpoint, Network, NetworkConfig, mac_for};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tempfile::TempDir;

/// How long a test waits for what must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long a test waits for what must not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(400);

pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub(crate) const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Runs a test on a thread with network and mount namespaces of its own, so that all it makes goes
/// with it, also when it fails.
pub(crate) fn on_a_host<F>(test: impl FnOnce(World) -> F + Send + 'static)
where
    F: Future<Output = ()>,
{
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("tests need root");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { test(World::new()).await });
    });
    if let Err(panic) = thread.join() {
        resume_unwind(panic);
    }
}

/// The calling thread's network is the host's.
pub(crate) struct World {
    pub(crate) outside: Namespace,
    dir: TempDir,
}

impl World {
    fn new() -> World {
        let outside = Namespace::new();
        ip("link set lo up");
        ip("link add out0 type veth peer name out1");
        ip(&format!("addr add {HOST}/24 dev out0"));
        ip("link set out0 up");
        // A second thread holds the namespace, so the move is by its id.
        outside.adopt("out1");
        ip(&format!("route add default via {OUTSIDE}"));
        outside.run(|| {
            ip("link set lo up");
            ip(&format!("addr add {OUTSIDE}/24 dev out1"));
            ip(&format!("addr add {METADATA}/32 dev out1"));
            ip("link set out1 up");
        });
        World {
            outside,
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn config(&self) -> NetworkConfig {
        NetworkConfig {
            netns_dir: self.dir.path().join("netns"),
            ..NetworkConfig::default()
        }
    }

    pub(crate) async fn network(&self) -> Network {
        Network::ensure(self.config()).await.unwrap()
    }
}

/// A network namespace that a test can run code in.
pub(crate) struct Namespace {
    file: File,
}

impl Namespace {
    fn new() -> Namespace {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        Namespace {
            file: made.join().unwrap(),
        }
    }

    pub(crate) fn open(path: &Path) -> Namespace {
        Namespace {
            file: File::open(path).unwrap(),
        }
    }

    /// Starts `work` on a thread of the namespace.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let file = self.file.try_clone().unwrap();
        thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        self.spawn(work)
            .join()
            .unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Moves an interface of the calling thread's namespace into this one.
    fn adopt(&self, interface: &str) {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd());
        ip(&format!("link set {interface} netns {path}"));
    }
}

/// An attached container.
pub(crate) struct Instance {
    pub(crate) address: Ipv4Addr,
    pub(crate) inside: Namespace,
}

pub(crate) fn request(name: &str, last: u8) -> AttachRequest {
    let address = Ipv4Addr::new(10, 209, 0, last);
    AttachRequest {
        name: name.into(),
        endpoint: Endpoint::Namespace,
        address,
        mac: mac_for(address),
        ports: Vec::new(),
        limits: NetworkLimits::default(),
        owner_uid: None,
    }
}

pub(crate) async fn attach(network: &Network, request: &AttachRequest) -> Instance {
    let attachment = network.attach(request).await.unwrap();
    let inside = Namespace::open(attachment.netns.as_deref().unwrap());
    Instance {
        address: attachment.address,
        inside,
    }
}

pub(crate) fn port(host: u16, instance: u16, protocol: Protocol) -> PortSpec {
    PortSpec {
        host_ip: None,
        host,
        instance,
        protocol,
    }
}

/// Runs `ip` in the calling thread's network.
pub(crate) fn ip(arguments: &str) -> String {
    output("ip", arguments)
}

pub(crate) fn output(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split(' '))
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Answers one TCP connection with the address that it came from.
pub(crate) fn serve(namespace: &Namespace, port: u16) -> JoinHandle<()> {
    let listener = namespace.run(move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        stream.write_all(peer.ip().to_string().as_bytes()).unwrap();
    })
}

/// What the server of [`serve`] says, or `None` if it cannot be reached.
pub(crate) fn ask(address: Ipv4Addr, port: u16, timeout: Duration) -> Option<String> {
    let target = SocketAddr::from((address, port));
    let mut stream = match TcpStream::connect_timeout(&target, timeout) {
        Ok(stream) => stream,
        Err(error) => {
            let expected = [
                ErrorKind::TimedOut,
                ErrorKind::WouldBlock,
                ErrorKind::ConnectionRefused,
                ErrorKind::HostUnreachable,
                ErrorKind::NetworkUnreachable,
            ];
            assert!(expected.contains(&error.kind()), "{error:?}");
            return None;
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    Some(answer)
}

/// The sender of the next datagram, if one comes.
pub(crate) fn next_sender(socket: &UdpSocket, timeout: Duration) -> Option<SocketAddr> {
    socket.set_read_timeout(Some(timeout)).unwrap();
    match socket.recv_from(&mut [0; 64]) {
        Ok((_, sender)) => Some(sender),
        Err(error) => {
            assert!(
                matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                "{error}"
            );
            None
        }
    }
}

/// All that `ip` and `nft` show of the calling thread's network, to compare before and after.
pub(crate) fn everything() -> String {
    let links: HashSet<String> = ip("-o link")
        .lines()
        .filter_map(|line| line.split(": ").nth(1))
        .map(str::to_string)
        .collect();
    let mut links: Vec<_> = links.into_iter().collect();
    links.sort();
    format!("{links:?}\n{}", output("nft", "list ruleset"))
}
