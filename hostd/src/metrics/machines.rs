//! Metrics of what only VMs have: by processor, and by device.

use crate::api::types::{DeviceStats, VcpuStats, VmStats};

/// Values, each with its labels.
type Samples = Vec<(String, u64)>;

/// A metric's name, its type, what it says, and what there is of it in the stats.
type Metric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&VmStats) -> Samples,
);

pub(super) const METRICS: &[Metric] = &[
    (
        "vcpu_run_microseconds_total",
        "counter",
        "Time that a virtual processor ran",
        |vm| by_vcpu(vm, |vcpu| vcpu.run_us),
    ),
    (
        "vcpu_steal_microseconds_total",
        "counter",
        "Time that a virtual processor waited for one of the host's",
        |vm| by_vcpu(vm, |vcpu| vcpu.steal_us),
    ),
    (
        "vcpu_exits_total",
        "counter",
        "Times that a virtual processor needed its VMM",
        |vm| by_vcpu(vm, |vcpu| Some(vcpu.exits.total)),
    ),
    (
        "guest_memory_bytes",
        "gauge",
        "Memory that a guest has, with what is in its balloon",
        |vm| vec![(String::new(), vm.memory.size_bytes)],
    ),
    (
        "balloon_bytes",
        "gauge",
        "Memory that a guest has in its balloon",
        |vm| {
            let balloon = vm.balloon.iter();
            balloon
                .map(|balloon| (String::new(), balloon.actual_bytes))
                .collect()
        },
    ),
    (
        "device_kicks_total",
        "counter",
        "Times that a driver kicked a queue of its device",
        |vm| by_device(vm, |device| Some(device.kicks)),
    ),
    (
        "device_interrupts_total",
        "counter",
        "Interrupts of a device",
        |vm| by_device(vm, |device| Some(device.interrupts)),
    ),
    (
        "device_failures_total",
        "counter",
        "Times that a driver broke the rules of its device",
        |vm| by_device(vm, |device| Some(device.failures)),
    ),
    (
        "device_read_bytes_total",
        "counter",
        "Bytes that a guest read from a disk of its",
        |vm| by_device(vm, |device| Some(device.disk?.read_bytes)),
    ),
    (
        "device_write_bytes_total",
        "counter",
        "Bytes that a guest wrote to a disk of its",
        |vm| by_device(vm, |device| Some(device.disk?.write_bytes)),
    ),
    (
        "device_read_operations_total",
        "counter",
        "Reads of a disk by its guest",
        |vm| by_device(vm, |device| Some(device.disk?.read_ops)),
    ),
    (
        "device_write_operations_total",
        "counter",
        "Writes of a disk by its guest",
        |vm| by_device(vm, |device| Some(device.disk?.write_ops)),
    ),
    (
        "device_flush_operations_total",
        "counter",
        "Flushes of a disk by its guest",
        |vm| by_device(vm, |device| Some(device.disk?.flush_ops)),
    ),
    (
        "device_ingress_dropped_total",
        "counter",
        "Frames that a guest had no buffers for",
        |vm| by_device(vm, |device| Some(device.net?.ingress_dropped)),
    ),
    (
        "device_egress_dropped_total",
        "counter",
        "Frames of a guest that could not be sent",
        |vm| by_device(vm, |device| Some(device.net?.egress_dropped)),
    ),
];

fn by_vcpu(vm: &VmStats, read: fn(&VcpuStats) -> Option<u64>) -> Samples {
    let numbered = vm.vcpus.iter().enumerate();
    let samples = numbered.filter_map(|(number, vcpu)| {
        let value = read(vcpu)?;
        Some((format!(",vcpu=\"{number}\""), value))
    });
    samples.collect()
}

/// Names of devices are letters and digits: the driver sees to that.
fn by_device(vm: &VmStats, read: fn(&DeviceStats) -> Option<u64>) -> Samples {
    let samples = vm.devices.iter().filter_map(|(name, device)| {
        let value = read(device)?;
        Some((format!(",device=\"{name}\""), value))
    });
    samples.collect()
}
