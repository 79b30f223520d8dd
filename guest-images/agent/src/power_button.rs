//! The power button of the machine: a press asks the workload to stop, and needs nothing of what else
//! the host and the agent have between them.
//!
//! The kernel's driver for the button makes an input device of it (Documentation/input/input.rst).

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use crate::console::say;
use crate::reaper::STACK_BYTES;
use crate::server::Agent;

/// Where the kernel describes its input devices, and where it has their files.
const DESCRIPTIONS: &str = "/sys/class/input";
const DEVICES: &str = "/dev/input";

/// Numbers of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// The value of a key that has been pressed; it is 0 when it is let go.
const PRESSED: i32 = 1;

/// An event (`struct input_event` of linux/input.h): the time, then type, code and value.
const EVENT_BYTES: usize = 24;
const TYPE_AT: usize = 16;
const CODE_AT: usize = 18;
const VALUE_AT: usize = 20;

/// A press and its end are four events.
const EVENTS_MAX: usize = 16;

/// Opens the button, if there is one. Presses from then on are kept until they are read. The driver
/// announces it before its module has loaded, so there is nothing to wait for.
pub(crate) fn open() -> io::Result<Option<File>> {
    match find(Path::new(DESCRIPTIONS))? {
        Some(name) => File::open(Path::new(DEVICES).join(name)).map(Some),
        None => Ok(None),
    }
}

/// The name of the first device with events that has a key for the power.
fn find(folder: &Path) -> io::Result<Option<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let keys = fs::read_to_string(entry.path().join("device/capabilities/key"));
        if name.starts_with("event") && keys.is_ok_and(|keys| has_key(&keys, KEY_POWER)) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names.into_iter().next())
}

/// Whether a key is in the kernel's list of them: hexadecimal words of 64 bits, the last of which is
/// for the first keys.
fn has_key(keys: &str, key: u16) -> bool {
    let word = keys.split_whitespace().rev().nth(usize::from(key / 64));
    let word = word.and_then(|word| u64::from_str_radix(word, 16).ok());
    word.is_some_and(|word| word >> (key % 64) & 1 == 1)
}

/// Sends the workload `signal` at each press, in a thread of its own.
pub(crate) fn watch(button: File, agent: Arc<Agent>, signal: i32) -> io::Result<()> {
    let thread = thread::Builder::new().stack_size(STACK_BYTES);
    let ask_to_stop = move || {
        if let Err(error) = agent.signal_workload(signal) {
            say(&format!("Failed to signal the workload: {error}"));
        }
    };
    let watch = move || {
        let error = hear(button, ask_to_stop);
        say(&format!("The power button is not heard any more: {error}"));
    };
    thread.spawn(watch).map(drop)
}

/// Acts at each press, until the button fails. The kernel gives whole events only.
fn hear(mut button: impl Read, mut act: impl FnMut()) -> io::Error {
    let mut events = [0; EVENTS_MAX * EVENT_BYTES];
    loop {
        match button.read(&mut events) {
            Ok(0) => return io::ErrorKind::UnexpectedEof.into(),
            Ok(count) => {
                let (events, _) = events[..count].as_chunks();
                for _ in events.iter().filter(|event| is_press(event)) {
                    act();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error,
        }
    }
}

fn is_press(event: &[u8; EVENT_BYTES]) -> bool {
    let number = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    number(TYPE_AT) == EV_KEY
        && number(CODE_AT) == KEY_POWER
        && event[VALUE_AT..] == PRESSED.to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_counted_from_the_last_word() {
        for (keys, has) in [
            // The kernel's button for the power, the one for sleep, and a keyboard.
            ("10000000000000 0\n", true),
            ("4000 0 0\n", false),
            (
                "402000000 3803078f800d001 feffffdfffefffff fffffffffffffffe\n",
                true,
            ),
            ("10000000000000\n", false),
            ("0\n", false),
            ("\n", false),
            ("x 0\n", false),
        ] {
            assert_eq!(has_key(keys, KEY_POWER), has, "{keys}");
        }
    }

    #[test]
    fn the_button_is_found_among_the_devices() {
        let folder = tempfile::tempdir().unwrap();
        for (name, keys) in [
            ("event0", Some("4000 0 0\n")),
            ("event1", Some("10000000000000 0\n")),
            ("input1", Some("10000000000000 0\n")),
            ("mice", None),
        ] {
            let capabilities = folder.path().join(name).join("device/capabilities");
            fs::create_dir_all(&capabilities).unwrap();
            if let Some(keys) = keys {
                fs::write(capabilities.join("key"), keys).unwrap();
            }
        }
        assert_eq!(find(folder.path()).unwrap(), Some("event1".into()));
        fs::remove_dir_all(folder.path().join("event1")).unwrap();
        assert_eq!(find(folder.path()).unwrap(), None);
        assert_eq!(find(&folder.path().join("none")).unwrap(), None);
    }

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut event = vec![0xff; TYPE_AT];
        event.extend_from_slice(&kind.to_ne_bytes());
        event.extend_from_slice(&code.to_ne_bytes());
        event.extend_from_slice(&value.to_ne_bytes());
        event
    }

    #[test]
    fn presses_are_heard_and_nothing_else() {
        let one = [
            event(EV_KEY, KEY_POWER, PRESSED),
            event(0, 0, 0),
            event(EV_KEY, KEY_POWER, 0),
            event(EV_KEY, KEY_POWER + 1, PRESSED),
            event(EV_KEY + 1, KEY_POWER, PRESSED),
        ];
        let all = one.concat().repeat(40);
        let mut presses = 0;
        let error = hear(all.as_slice(), || presses += 1);
        assert_eq!(presses, 40);
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
