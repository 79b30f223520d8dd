//! The kernel command line: what was asked for, and where the devices are.

use std::fmt::Write as _;

use crate::layout::{CMDLINE_BYTES_MAX, VIRTIO_BYTES};
use crate::virtio::transport::Window;

/// The command line cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    #[error("`/boot/cmdline` holds a zero byte or a line break; remove it")]
    Character,
    #[error(
        "`/boot/cmdline` takes {bytes} bytes with the devices' addresses; at most {} are possible",
        CMDLINE_BYTES_MAX - 1
    )]
    Length { bytes: usize },
}

/// The command line for a machine with these devices.
///
/// Kernels that read ACPI tables find the devices there, and ignore a second mention. What is
/// behind a `--` goes to the first process, so the devices go before it.
pub fn cmdline(asked: &str, windows: &[Window]) -> Result<String, CmdlineError> {
    if asked.contains(['\0', '\n', '\r']) {
        return Err(CmdlineError::Character);
    }
    let mut devices = String::new();
    for Window { address, gsi } in windows {
        write!(
            devices,
            " virtio_mmio.device={VIRTIO_BYTES:#x}@{address:#x}:{gsi}"
        )
        .expect("a string takes everything");
    }
    let (kernel, rest) = match asked.split_once(" -- ") {
        Some((kernel, rest)) => (kernel, format!(" -- {rest}")),
        None => (asked, String::new()),
    };
    let line = format!("{kernel}{devices}{rest}").trim_start().to_owned();
    if line.len() < CMDLINE_BYTES_MAX {
        Ok(line)
    } else {
        Err(CmdlineError::Length { bytes: line.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_go_behind_what_was_asked_for() {
        let windows = [Window::nth(0), Window::nth(1)];
        let both = "virtio_mmio.device=0x1000@0xd0000000:6 virtio_mmio.device=0x1000@0xd0001000:7";
        for (asked, want) in [
            ("console=ttyS0", format!("console=ttyS0 {both}")),
            ("quiet -- sh -c x", format!("quiet {both} -- sh -c x")),
            ("", both.to_owned()),
        ] {
            assert_eq!(cmdline(asked, &windows).unwrap(), want);
        }
    }

    #[test]
    fn a_line_that_the_kernel_would_cut_is_refused() {
        let longest = "x".repeat(CMDLINE_BYTES_MAX - 1);
        assert_eq!(cmdline(&longest, &[]).unwrap(), longest);
        for bad in [longest.clone() + "x", "a\nb".into(), "a\0b".into()] {
            cmdline(&bad, &[]).unwrap_err();
        }
    }
}
