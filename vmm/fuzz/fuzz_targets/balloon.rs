//! virtio-balloon against a hostile driver, and a host that asks for this and that.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::memory::MemoryPlan;
use vmm::spec;
use vmm::virtio::VirtioDevice;
use vmm::virtio::balloon::Balloon;
use vmm_fuzz::{Script, run};

fuzz_target!(|input: (u16, [u8; 12], Script)| {
    let (target, config, script) = input;
    let memory = MemoryPlan {
        boot_bytes: 1 << 20,
        hotplug_bytes: 0,
        huge_pages: spec::HugePages::Transparent,
    };
    let balloon = Balloon::new(spec::Balloon::default(), &memory);
    let mut balloon = balloon.expect("an event can be made");
    let handle = balloon.handle();
    handle.set_target(u64::from(target) << 12);
    let _ = handle.statistics();
    balloon.write_config(config[0].into(), &config[1..]);
    run(&mut balloon, script);
});
