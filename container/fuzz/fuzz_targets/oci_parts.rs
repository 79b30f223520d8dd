//! Any bytes as the process of `exec --process` and as the limits of `update --resources`: the answer is a
//! plan or an error, and never a panic. Carries nothing out.
#![no_main]

use container::verbs::check::{check_process, check_resources};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Err(error) = check_process(text) {
        assert!(!error.to_string().is_empty());
    }
    // There is no such group.
    if let Ok(resources) = serde_json::from_slice(text)
        && let Err(error) = check_resources(&resources, "/hostd-fuzzed")
    {
        assert!(!error.to_string().is_empty());
    }
});
