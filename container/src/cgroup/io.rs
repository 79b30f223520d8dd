//! Limits of block I/O: `linux.resources.blockIO` as values of the blkio (v1) or io (v2)
//! controller.

use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice, LinuxWeightDevice};

use super::{CgroupError, Directory, hierarchy::Version, setting::Setting};

/// The range of `weight` in the configuration (runtime-spec, config-linux, Block IO).
const WEIGHT_MIN: u16 = 10;
const WEIGHT_MAX: u16 = 1000;

pub(super) fn plan(
    directory: &Directory,
    block: &LinuxBlockIo,
) -> Result<Vec<Setting>, CgroupError> {
    let mut settings = Vec::new();
    let devices = block.weight_device().as_deref().unwrap_or_default();
    let leaves = devices.iter().filter_map(LinuxWeightDevice::leaf_weight);
    let mut leaves = block.leaf_weight().into_iter().chain(leaves);
    if let Some(weight) = leaves.find(|weight| *weight != 0) {
        let reason = "no scheduler of current kernels has leaf weights";
        return Err(CgroupError::invalid("blockIO.leafWeight", weight, reason));
    }
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        check_weight("blockIO.weight", weight)?;
        settings.push(weight_setting(directory, weight));
    }
    for device in devices {
        settings.extend(device_weight(directory, device)?);
    }
    // The v1 file and the v2 key of each kind of throttle.
    for (field, file, key, devices) in [
        (
            "blockIO.throttleReadBpsDevice",
            "blkio.throttle.read_bps_device",
            "rbps",
            block.throttle_read_bps_device(),
        ),
        (
            "blockIO.throttleWriteBpsDevice",
            "blkio.throttle.write_bps_device",
            "wbps",
            block.throttle_write_bps_device(),
        ),
        (
            "blockIO.throttleReadIOPSDevice",
            "blkio.throttle.read_iops_device",
            "riops",
            block.throttle_read_iops_device(),
        ),
        (
            "blockIO.throttleWriteIOPSDevice",
            "blkio.throttle.write_iops_device",
            "wiops",
            block.throttle_write_iops_device(),
        ),
    ] {
        for device in devices.iter().flatten() {
            settings.push(match directory.version {
                Version::V1 => {
                    let value = format!("{} {}", numbers(device), device.rate());
                    Setting::new(field, &directory.path, file, value)
                }
                Version::V2 => Setting::new(field, &directory.path, "io.max", io_max(device, key)),
            });
        }
    }
    Ok(settings)
}

fn numbers(device: &LinuxThrottleDevice) -> String {
    format!("{}:{}", device.major(), device.minor())
}

/// A line of io.max; a rate of zero means no limit, as it does on v1.
fn io_max(device: &LinuxThrottleDevice, key: &str) -> String {
    match device.rate() {
        0 => format!("{} {key}=max", numbers(device)),
        rate => format!("{} {key}={rate}", numbers(device)),
    }
}

fn check_weight(field: &'static str, weight: u16) -> Result<(), CgroupError> {
    if (WEIGHT_MIN..=WEIGHT_MAX).contains(&weight) {
        return Ok(());
    }
    Err(CgroupError::invalid(
        field,
        weight,
        "it is between 10 and 1000",
    ))
}

/// The weight for whichever scheduler is there. BFQ has the same range in both versions.
fn weight_setting(directory: &Directory, weight: u16) -> Setting {
    let field = "blockIO.weight";
    let path = &directory.path;
    match (directory.version, bfq(directory)) {
        (Version::V1, Some(file)) | (Version::V2, Some(file)) => {
            Setting::new(field, path, file, weight)
        }
        (Version::V1, None) => Setting::new(field, path, "blkio.weight", weight),
        (Version::V2, None) => Setting::new(field, path, "io.weight", io_weight(weight)),
    }
}

/// The weight for one device; nothing where the configuration names none.
fn device_weight(
    directory: &Directory,
    device: &LinuxWeightDevice,
) -> Result<Option<Setting>, CgroupError> {
    let field = "blockIO.weightDevice";
    let Some(weight) = device.weight().filter(|weight| *weight != 0) else {
        return Ok(None);
    };
    check_weight(field, weight)?;
    let (major, minor) = (device.major(), device.minor());
    let path = &directory.path;
    let bfq_device = path.join("blkio.bfq.weight_device").exists();
    let (file, weight) = match (directory.version, bfq(directory)) {
        (Version::V1, _) if bfq_device => ("blkio.bfq.weight_device", u64::from(weight)),
        (Version::V1, _) => ("blkio.weight_device", u64::from(weight)),
        (Version::V2, Some(file)) => (file, u64::from(weight)),
        (Version::V2, None) => ("io.weight", io_weight(weight)),
    };
    Ok(Some(Setting::new(
        field,
        path,
        file,
        format!("{major}:{minor} {weight}"),
    )))
}

fn bfq(directory: &Directory) -> Option<&'static str> {
    let file = match directory.version {
        Version::V1 => "blkio.bfq.weight",
        Version::V2 => "io.bfq.weight",
    };
    directory
        .path
        .join(Path::new(file))
        .exists()
        .then_some(file)
}

/// Spreads the range 10..=1000 over io.weight's 1..=10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight) - u64::from(WEIGHT_MIN)) * 9999 / u64::from(WEIGHT_MAX - WEIGHT_MIN)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{
        LinuxBlockIoBuilder, LinuxThrottleDeviceBuilder, LinuxWeightDeviceBuilder,
    };

    use super::*;

    fn lines(version: Version, path: &Path, block: &LinuxBlockIo) -> Vec<String> {
        let settings = plan(&Directory::for_test(version, "io", path), block).unwrap();
        let line = |setting: &Setting| {
            format!(
                "{}={}",
                setting.file.file_name().unwrap().to_str().unwrap(),
                setting.value
            )
        };
        settings.iter().map(line).collect()
    }

    #[test]
    fn throttles_and_weights_are_written_as_each_version_wants_them() {
        let throttle = |rate| {
            let new = LinuxThrottleDeviceBuilder::default();
            vec![new.major(8).minor(16).rate(rate).build().unwrap()]
        };
        let weight = LinuxWeightDeviceBuilder::default()
            .major(8)
            .minor(0)
            .weight(1000u16);
        let block = LinuxBlockIoBuilder::default()
            .weight(10u16)
            .weight_device(vec![weight.build().unwrap()])
            .throttle_read_bps_device(throttle(1_048_576u64))
            .throttle_write_iops_device(throttle(0u64))
            .build()
            .unwrap();
        let nowhere = Path::new("/nonexistent");
        assert_eq!(
            lines(Version::V1, nowhere, &block),
            [
                "blkio.weight=10",
                "blkio.weight_device=8:0 1000",
                "blkio.throttle.read_bps_device=8:16 1048576",
                "blkio.throttle.write_iops_device=8:16 0",
            ]
        );
        assert_eq!(
            lines(Version::V2, nowhere, &block),
            [
                "io.weight=1",
                "io.weight=8:0 10000",
                "io.max=8:16 rbps=1048576",
                "io.max=8:16 wiops=max",
            ]
        );
        let bfq = tempfile::tempdir().unwrap();
        std::fs::write(bfq.path().join("io.bfq.weight"), "").unwrap();
        assert_eq!(
            lines(Version::V2, bfq.path(), &block)[0],
            "io.bfq.weight=10"
        );
    }

    #[test]
    fn a_weight_out_of_range_is_refused() {
        for weight in [9u16, 1001] {
            let block = LinuxBlockIoBuilder::default()
                .weight(weight)
                .build()
                .unwrap();
            let directory = Directory::for_test(Version::V2, "io", Path::new("/nonexistent"));
            plan(&directory, &block).unwrap_err();
        }
        assert_eq!(io_weight(500), 4950);
    }
}
