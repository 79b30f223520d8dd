//! Any bytes as a config.json: the answer is a plan or an error, and never a panic. Carries nothing out.
#![no_main]

use std::path::Path;

use container::verbs::check::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Err(error) = check(text.to_vec(), Path::new("/"), "fuzzed") {
        assert!(!error.to_string().is_empty());
    }
});
