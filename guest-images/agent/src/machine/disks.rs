//! Finds disks by the serial numbers that the host gave them.

use std::fs;
use std::io;
use std::path::Path;

use super::SetUpError;

const DISKS: &str = "/sys/block";

/// The device file of the disk with the serial number `serial`. Drivers announce their disks before
/// their modules have loaded, so there is nothing to wait for.
pub(super) fn find(serial: &str) -> Result<String, SetUpError> {
    let disks = list(Path::new(DISKS)).map_err(SetUpError::Disks)?;
    let name = disks.iter().find(|(_, number)| number == serial);
    name.map(|(name, _)| format!("/dev/{name}"))
        .ok_or_else(|| SetUpError::NoDisk {
            serial: serial.into(),
            found: describe(&disks),
        })
}

/// Names and serial numbers of those disks that have one.
fn list(folder: &Path) -> io::Result<Vec<(String, String)>> {
    let mut disks = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if let Ok(serial) = fs::read_to_string(entry.path().join("serial")) {
            let name = entry.file_name().to_string_lossy().into_owned();
            disks.push((name, serial.trim_end().to_owned()));
        }
    }
    Ok(disks)
}

fn describe(disks: &[(String, String)]) -> String {
    let numbers: Vec<_> = disks.iter().map(|(_, number)| number.as_str()).collect();
    if numbers.is_empty() {
        "none".into()
    } else {
        numbers.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_listed_by_serial_number() {
        let folder = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("image\n")), ("vdb", Some("")), ("loop0", None)] {
            fs::create_dir(folder.path().join(name)).unwrap();
            if let Some(serial) = serial {
                fs::write(folder.path().join(name).join("serial"), serial).unwrap();
            }
        }
        let mut disks = list(folder.path()).unwrap();
        disks.sort();
        let want = [("vda", "image"), ("vdb", "")];
        assert_eq!(
            disks,
            want.map(|(name, serial)| (name.into(), serial.into()))
        );
        assert_eq!(describe(&disks), "image, ");
        assert_eq!(describe(&[]), "none");
    }
}
