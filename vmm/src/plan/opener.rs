//! Opens what a specification names: files, descriptors that were inherited, sockets to be.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use super::{
    CID_MIN, ConsolePlan, ListenPlan, MTU_MIN, NetPlan, PlanError, TapPlan, VsockPlan, in_range,
    memory, range,
};
use crate::descriptors::Inherited;
use crate::devices::serial::{Bounded, Output, Patient};
use crate::guest_status;
use crate::memory::{Image, MemoryPlan};
use crate::spec::{Console, ConsoleTarget, Net, Pmem, StreamDirection, Vsock};
use crate::virtio::vsock::HostStream;

/// What a file is opened for.
#[derive(Clone, Copy)]
pub(super) enum Access {
    Read,
    ReadWrite,
    Device,
    Vhost,
    /// To be written anew.
    Create,
    /// To be written at its end.
    Append,
}

impl Access {
    fn options(self) -> OpenOptions {
        let mut options = OpenOptions::new();
        match self {
            Access::Read => options.read(true),
            Access::ReadWrite | Access::Device | Access::Vhost => options.read(true).write(true),
            Access::Create => options.write(true).create(true).truncate(true),
            Access::Append => options.append(true).create(true),
        };
        options
    }

    fn remedy(self) -> &'static str {
        match self {
            Access::Read => "name a file that this user may read",
            Access::ReadWrite => "name a file that this user may read and write, or set read_only",
            Access::Device => {
                "load kvm_intel or kvm_amd, and let this user read and write the device"
            }
            Access::Vhost => {
                "load vhost_net, and let this user read and write /dev/vhost-net; or leave it out"
            }
            Access::Create | Access::Append => "name a file that this user may write",
        }
    }
}

/// Opens files for fields.
#[derive(Default)]
pub(super) struct Opener {
    inherited: Inherited,
}

impl Opener {
    pub(super) fn file(
        &mut self,
        field: &str,
        path: &Path,
        access: Access,
    ) -> Result<File, PlanError> {
        self.inherited
            .open(path, &access.options())
            .map_err(|source| PlanError::File {
                field: field.to_owned(),
                remedy: access.remedy(),
                source,
            })
    }

    pub(super) fn each<S, P>(
        &mut self,
        field: &str,
        specs: &[S],
        plan: impl Fn(&mut Self, &str, &S) -> Result<P, PlanError>,
    ) -> Result<Vec<P>, PlanError> {
        let mut plans = Vec::new();
        for (index, spec) in specs.iter().enumerate() {
            plans.push(plan(self, &format!("{field}/{index}"), spec)?);
        }
        Ok(plans)
    }

    /// As [`each`](Self::each), of devices whose names have these numbers.
    pub(super) fn numbered<S, P>(
        &mut self,
        field: &str,
        numbers: &[u16],
        specs: &[S],
        plan: impl Fn(&mut Self, &str, u16, &S) -> Result<P, PlanError>,
    ) -> Result<Vec<P>, PlanError> {
        let numbered = numbers.iter().zip(specs).enumerate();
        numbered
            .map(|(index, (number, spec))| plan(self, &format!("{field}/{index}"), *number, spec))
            .collect()
    }

    /// Each behind the other, after all memory.
    pub(super) fn images(
        &mut self,
        memory: &MemoryPlan,
        pmem: &[Pmem],
    ) -> Result<Vec<Image>, PlanError> {
        let mut images: Vec<Image> = Vec::new();
        for (index, pmem) in pmem.iter().enumerate() {
            let field = format!("/pmem/{index}/path");
            let file = self.file(&field, &pmem.path, Access::Read)?;
            lock(&field, &file, true)?;
            let start = images
                .last()
                .map_or_else(|| memory.end(), |image| image.range.end);
            images.push(memory::image(&field, file, start)?);
        }
        Ok(images)
    }

    pub(super) fn net(
        &mut self,
        field: &str,
        number: u16,
        net: &Net,
    ) -> Result<NetPlan, PlanError> {
        let mac = check_net(field, number, net)?;
        let vhost = match &net.vhost {
            Some(path) => Some(self.file(&format!("{field}/vhost"), path, Access::Vhost)?),
            None => None,
        };
        let field = format!("{field}/tap");
        let open = self.descriptor(&field, Path::new(&net.tap))?;
        let tap = match open {
            Some(descriptor) => TapPlan::Open(descriptor),
            None if (1..16).contains(&net.tap.len()) && !net.tap.contains('/') => {
                TapPlan::Name(net.tap.clone())
            }
            None => {
                let wanted = "the name of an interface, 1 to 15 bytes, or fd:N";
                return Err(range(&field, format!("{:?}", net.tap), wanted));
            }
        };
        Ok(NetPlan {
            name: format!("net{number}"),
            tap,
            mac,
            mtu: net.mtu,
            vhost,
            limits: net.limits,
        })
    }

    pub(super) fn vsock(&mut self, vsock: &Vsock) -> Result<VsockPlan, PlanError> {
        // The highest number means "any".
        let cid = in_range("/vsock/cid", vsock.cid, CID_MIN, u32::MAX - 1)?;
        let listen = self.listen("/vsock/path", &vsock.path)?;
        let streams = self.each("/vsock/streams", &vsock.streams, |open, field, stream| {
            let access = match stream.direction {
                StreamDirection::ToGuest => Access::Read,
                StreamDirection::FromGuest => Access::Append,
            };
            if stream.port == guest_status::VSOCK_PORT {
                let wanted = "another port than the one for the guest's reports";
                return Err(range(
                    &format!("{field}/port"),
                    stream.port.to_string(),
                    wanted,
                ));
            }
            Ok(HostStream {
                port: stream.port,
                file: open.file(&format!("{field}/path"), &stream.path, access)?,
                direction: stream.direction,
            })
        })?;
        Ok(VsockPlan {
            cid,
            listen,
            streams,
        })
    }

    pub(super) fn listen(&mut self, field: &str, path: &Path) -> Result<ListenPlan, PlanError> {
        Ok(match self.descriptor(field, path)? {
            Some(descriptor) => ListenPlan::Open(descriptor.into()),
            None => ListenPlan::Path(path.to_owned()),
        })
    }

    fn descriptor(&mut self, field: &str, path: &Path) -> Result<Option<OwnedFd>, PlanError> {
        self.inherited
            .descriptor(path)
            .map_err(|source| PlanError::File {
                field: field.to_owned(),
                remedy: "name a descriptor that was handed to this process",
                source,
            })
    }

    pub(super) fn console(&mut self, console: Option<&Console>) -> Result<ConsolePlan, PlanError> {
        let (output, input) = match console {
            None => (Output::Discard, None),
            Some(Console::Target(ConsoleTarget::Path(path))) => {
                let file = self.file("/console/path", path, Access::Append)?;
                let bounded = Bounded::new(file).map_err(examine("/console/path"))?;
                (Output::File(bounded), None)
            }
            Some(Console::Name(name)) if name == "stdio" => {
                let examine = examine("/console");
                let output = io::stdout().as_fd().try_clone_to_owned();
                let input = io::stdin().as_fd().try_clone_to_owned();
                (
                    Output::Stream(Patient::new(output.map_err(&examine)?.into())),
                    Some(input.map_err(&examine)?.into()),
                )
            }
            Some(Console::Name(name)) => {
                let wanted = r#"{"path": FILE} or "stdio""#;
                return Err(range("/console", format!("{name:?}"), wanted));
            }
        };
        Ok(ConsolePlan { output, input })
    }
}

/// Checks what is to be said of a network interface without its tap. Returns its address.
pub(super) fn check_net(field: &str, number: u16, net: &Net) -> Result<[u8; 6], PlanError> {
    if let Some(mtu) = net.mtu {
        in_range(&format!("{field}/mtu"), mtu, MTU_MIN, u16::MAX)?;
    }
    let Some(text) = &net.mac else {
        let [low, high] = number.wrapping_add(1).to_le_bytes();
        return Ok([2, 0, 0, 0, high, low]);
    };
    parse_mac(text).ok_or_else(|| {
        let field = format!("{field}/mac");
        let wanted = "six bytes in hexadecimal such as 02:00:00:00:00:01, not a group's";
        range(&field, format!("{text:?}"), wanted)
    })
}

pub(super) fn examine(field: &str) -> impl Fn(io::Error) -> PlanError {
    move |source| PlanError::Examine {
        field: field.to_owned(),
        source,
    }
}

/// Keeps two machines from writing to one disk, which would destroy its file system.
pub(super) fn lock(field: &str, file: &File, shared: bool) -> Result<(), PlanError> {
    let locked = if shared {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Err(TryLockError::WouldBlock) => Err(PlanError::InUse {
            field: field.to_owned(),
        }),
        // A file system without locks leaves the care to its user.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// A station's address: six bytes, not a group's.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        // A number may have a sign, an address may not.
        if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let group = mac[0] & 1 != 0;
    (parts.next().is_none() && !group && mac != [0; 6]).then_some(mac)
}
