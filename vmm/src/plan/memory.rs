//! The guest's memory, and images that it sees as memory, as they were asked for.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use super::opener::examine;
use super::{IMAGE_MIB_MAX, MEMORY_MIB_MAX, MEMORY_MIB_MIN, PlanError, in_range, range};
use crate::memory::{HUGE_PAGE_BYTES, Image, MemoryPlan};
use crate::spec::{HugePages, Memory};

/// How much memory, and of what kind.
pub(super) fn plan(spec: &Memory) -> Result<MemoryPlan, PlanError> {
    let size = spec.size_mib;
    in_range("/memory/size_mib", size, MEMORY_MIB_MIN, MEMORY_MIB_MAX)?;
    let most = spec.max_mib.unwrap_or(size);
    in_range("/memory/max_mib", most, size, MEMORY_MIB_MAX)?;
    let later = most - size;
    let block = HUGE_PAGE_BYTES >> 20;
    if !later.is_multiple_of(block) {
        let wanted = format!("{size} and a multiple of {block} more");
        return Err(range("/memory/max_mib", most.to_string(), wanted));
    }
    if spec.huge_pages == HugePages::Hugetlbfs {
        if !size.is_multiple_of(block) {
            let wanted = format!("a multiple of {block}, with pages of hugetlbfs");
            return Err(range("/memory/size_mib", size.to_string(), wanted));
        }
        if later > 0 {
            let wanted = "absent: pages of hugetlbfs are reserved from the start";
            return Err(range("/memory/max_mib", most.to_string(), wanted));
        }
    }
    Ok(MemoryPlan {
        boot_bytes: size << 20,
        hotplug_bytes: later << 20,
        huge_pages: spec.huge_pages,
    })
}

/// An image at `start`, of which the rest of the last huge page is zero.
pub(super) fn image(field: &str, mut file: File, start: u64) -> Result<Image, PlanError> {
    // Not by its metadata: a block device has no length there.
    let bytes = file.seek(SeekFrom::End(0)).map_err(examine(field))?;
    if bytes == 0 || bytes > IMAGE_MIB_MAX << 20 {
        let wanted = format!("from 1 byte to {IMAGE_MIB_MAX} MiB");
        return Err(range(field, format!("{bytes} bytes long"), wanted));
    }
    let start = start.next_multiple_of(HUGE_PAGE_BYTES);
    Ok(Image {
        file,
        bytes,
        range: start..start + bytes.next_multiple_of(HUGE_PAGE_BYTES),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::plan;

    #[test]
    fn memory_that_cannot_be_is_refused() {
        let huge =
            |size, most| json!({"size_mib": size, "max_mib": most, "huge_pages": "hugetlbfs"});
        for (memory, want) in [
            (
                json!({"size_mib": 32, "max_mib": 31}),
                "`/memory/max_mib` is 31",
            ),
            (
                json!({"size_mib": 32, "max_mib": 35}),
                "must be 32 and a multiple of 2 more",
            ),
            (
                json!({"size_mib": 32, "max_mib": u64::MAX}),
                "`/memory/max_mib`",
            ),
            (huge(33, json!(null)), "`/memory/size_mib` is 33"),
            (huge(32, json!(64)), "reserved from the start"),
        ] {
            let error = plan("/memory", memory).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        let more = plan("/memory", json!({"size_mib": 32, "max_mib": 64})).unwrap();
        assert_eq!(
            (more.memory.hotplug_bytes, more.windows.len()),
            (32 << 20, 6)
        );
        let same = plan("/memory", json!({"size_mib": 32, "max_mib": 32})).unwrap();
        assert_eq!((same.memory.hotplug_bytes, same.windows.len()), (0, 5));
        plan("/memory", huge(32, json!(null))).unwrap();
    }

    #[test]
    fn images_lie_behind_all_memory_in_whole_huge_pages() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let pmem = json!([{"path": file.path()}, {"path": file.path()}]);
        let error = plan("/pmem", pmem.clone()).unwrap_err().to_string();
        assert!(error.contains("`/pmem/0/path` is 0 bytes long"), "{error}");
        file.as_file().set_len((2 << 20) + 1).unwrap();
        let plan = plan("/pmem", pmem).unwrap();
        let ranges = plan.images.iter().map(|image| image.range.clone());
        let want = [0x100_0000..0x140_0000, 0x140_0000..0x180_0000];
        assert_eq!(ranges.collect::<Vec<_>>(), want);
        assert_eq!(plan.windows.len(), 7);
    }
}
