//! virtio-pmem against a hostile driver.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::memory::HUGE_PAGE_BYTES;
use vmm::virtio::pmem::Pmem;
use vmm_fuzz::{Script, run};

fuzz_target!(|script: Script| run(&mut Pmem::new(0..HUGE_PAGE_BYTES), script));
