//! Where devices are, and what disks and network interfaces are called: as they come, or, in a machine
//! that goes on, as they were. There, some may have come later and others may be gone.

use std::collections::BTreeSet;

use super::PlanError;
use crate::layout;
use crate::pci::bus::DEVICES_MAX;
use crate::snapshot::state::State;
use crate::spec::{Spec, Transport};
use crate::virtio::transport::Window;

/// Names and places of all devices of a machine.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Places {
    /// The number in the name of each disk, and of each network interface.
    pub disks: Vec<u16>,
    pub nets: Vec<u16>,
    /// One for each virtio device, in the order disks, nets, vsock, rng, balloon, mem, pmem.
    pub windows: Vec<Window>,
}

impl Places {
    /// Of a machine that boots.
    pub fn new(spec: &Spec) -> Result<Places, PlanError> {
        let devices = count(spec);
        let (most, place): (usize, fn(usize) -> Window) = match spec.transport {
            Transport::Mmio => (layout::VIRTIO_DEVICES_MAX, Window::nth),
            Transport::Pci => (DEVICES_MAX - 1, Window::slot),
        };
        if devices > most {
            return Err(PlanError::Devices { devices, most });
        }
        Ok(Places {
            disks: (0..).take(spec.disks.len()).collect(),
            nets: (0..).take(spec.nets.len()).collect(),
            windows: (0..devices).map(place).collect(),
        })
    }

    /// Of a machine that goes on.
    pub fn saved(state: &State) -> Result<Places, PlanError> {
        let spec = &state.machine;
        let mut places = Places::new(spec)?;
        let saved = &state.devices.virtio;
        if spec.transport == Transport::Mmio || saved.len() != places.windows.len() {
            // Whether it is so is checked when the devices are there.
            return Ok(places);
        }
        let mut slots = BTreeSet::new();
        for (window, device) in places.windows.iter_mut().zip(saved) {
            let number = device.interrupt;
            let possible = usize::try_from(number).is_ok_and(|number| number < DEVICES_MAX);
            if number == 0 || !possible || !slots.insert(number) {
                let name = device.name.clone();
                return Err(PlanError::Place { name, number });
            }
            *window = Window::on_bus(number);
        }
        let (disks, others) = saved.split_at(places.disks.len());
        for (numbers, devices, prefix) in [
            (&mut places.disks, disks, "disk"),
            (&mut places.nets, others, "net"),
        ] {
            let mut seen = BTreeSet::new();
            for (number, device) in numbers.iter_mut().zip(devices) {
                let parsed = device
                    .name
                    .strip_prefix(prefix)
                    .and_then(|n| n.parse().ok());
                match parsed {
                    Some(parsed) if seen.insert(parsed) => *number = parsed,
                    _ => {
                        let (name, number) = (device.name.clone(), device.interrupt);
                        return Err(PlanError::Place { name, number });
                    }
                }
            }
        }
        Ok(places)
    }
}

fn count(spec: &Spec) -> usize {
    let later = spec.memory.max_mib.unwrap_or(0);
    let mem = later > spec.memory.size_mib;
    let optional = [spec.vsock.is_some(), spec.rng, spec.balloon.is_some(), mem];
    let optional = optional.into_iter().filter(|there| *there).count();
    spec.disks.len() + spec.nets.len() + optional + spec.pmem.len()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A machine with two disks and a network interface, after one disk has gone and another come.
    fn state(transport: &str, devices: &[(&str, u32)]) -> State {
        let transport_state = json!({
            "device_id": 2, "status": 0, "driver_features": 0, "device_features_select": 0,
            "driver_features_select": 0, "queue_select": 0, "interrupt_status": 0,
            "config_generation": 0, "queues": [], "device": null,
        });
        let device = |(name, number): &(&str, u32)| {
            json!({
                "name": name, "address": 0, "interrupt": number, "transport": transport_state,
            })
        };
        let devices: Vec<Value> = devices.iter().map(device).collect();
        let serial = json!({
            "baud_divisor_low": 0, "baud_divisor_high": 0, "interrupt_enable": 0,
            "interrupt_identification": 0, "line_control": 0, "line_status": 0, "modem_control": 0,
            "modem_status": 0, "scratch": 0, "received": "",
        });
        serde_json::from_value(json!({
            "machine": {
                "boot": {"kernel": "k"}, "transport": transport, "rng": false, "balloon": null,
                "disks": [{"path": "a"}, {"path": "b"}], "nets": [{"tap": "t"}],
            },
            "clock": {"guest_ns": 0, "time_stamp": 0, "host_ns": 0},
            "processors": [],
            "devices": {
                "io_apic": {"id": 0, "select": 0, "redirections": []},
                "serial": serial, "ready": false, "virtio": devices,
            },
            "memory": {"regions": [], "written": null},
        }))
        .unwrap()
    }

    #[test]
    fn devices_that_go_on_are_where_they_were() {
        let devices = [("disk1", 2), ("disk0", 9), ("net3", 31)];
        let places = Places::saved(&state("pci", &devices)).unwrap();
        assert_eq!((places.disks, places.nets), (vec![1, 0], vec![3]));
        assert_eq!(places.windows, [2, 9, 31].map(Window::on_bus));
        // What has no slots is where it is.
        let places = Places::saved(&state("mmio", &devices)).unwrap();
        assert_eq!((places.disks, places.nets), (vec![0, 1], vec![0]));
        assert_eq!(places.windows, [0, 1, 2].map(Window::nth));
    }

    #[test]
    fn places_that_no_device_can_have_are_refused() {
        for devices in [
            [("disk0", 0), ("disk1", 2), ("net0", 3)],
            [("disk0", 1), ("disk1", 32), ("net0", 3)],
            [("disk0", 1), ("disk1", 1), ("net0", 3)],
            [("disk0", 1), ("disk0", 2), ("net0", 3)],
            [("disk0", 1), ("net1", 2), ("net0", 3)],
            [("disk0", 1), ("disk70000", 2), ("net0", 3)],
            [("disk0", 1), ("disk1", 2), ("net", 3)],
        ] {
            let error = Places::saved(&state("pci", &devices)).unwrap_err();
            assert!(matches!(error, PlanError::Place { .. }), "{devices:?}");
        }
    }
}
