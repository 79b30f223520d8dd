//! virtio-rng against a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::virtio::rng::Rng;
use vmm_fuzz::{Script, run};

fuzz_target!(|script: Script| run(&mut Rng::new(), script));
