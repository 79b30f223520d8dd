//! Numbers of the memory-mapped transport (virtio 1.2, section 4.2.2).

pub(super) const MAGIC: u64 = 0x000;
/// `virt`, first letter in the lowest byte.
pub(super) const MAGIC_VALUE: u32 = u32::from_le_bytes(*b"virt");
pub(super) const VERSION: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
pub(super) const VENDOR_ID: u64 = 0x00c;
pub(super) const VENDOR_ID_VALUE: u32 = u32::from_le_bytes(*b"hstd");
pub(super) const DEVICE_FEATURES: u64 = 0x010;
pub(super) const DEVICE_FEATURES_SELECT: u64 = 0x014;
pub(super) const DRIVER_FEATURES: u64 = 0x020;
pub(super) const DRIVER_FEATURES_SELECT: u64 = 0x024;
pub(super) const QUEUE_SELECT: u64 = 0x030;
pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
pub(super) const QUEUE_SIZE: u64 = 0x038;
pub(super) const QUEUE_READY: u64 = 0x044;
/// Where a driver kicks; the machine hands such writes to the event loop.
pub const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
pub(super) const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
pub(super) const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
pub(super) const QUEUE_AVAILABLE_LOW: u64 = 0x090;
pub(super) const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
pub(super) const QUEUE_USED_LOW: u64 = 0x0a0;
pub(super) const QUEUE_USED_HIGH: u64 = 0x0a4;
pub(super) const SHARED_MEMORY_LENGTH_LOW: u64 = 0x0b0;
pub(super) const SHARED_MEMORY_BASE_HIGH: u64 = 0x0bc;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
pub(super) const CONFIG: u64 = 0x100;

/// Interrupt causes.
pub(super) const INTERRUPT_USED: u32 = 1;
pub(super) const INTERRUPT_CONFIG: u32 = 1 << 1;

/// Device status bits (section 2.1), and the sums of them that a driver goes through.
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u32 = 1;
    pub(crate) const DRIVER: u32 = 1 << 1;
    pub(crate) const DRIVER_OK: u32 = 1 << 2;
    pub(crate) const FEATURES_OK: u32 = 1 << 3;
    pub(crate) const NEEDS_RESET: u32 = 1 << 6;
    pub(crate) const FAILED: u32 = 1 << 7;

    pub(crate) const HAS_ACKNOWLEDGE: u32 = ACKNOWLEDGE;
    pub(crate) const HAS_DRIVER: u32 = ACKNOWLEDGE | DRIVER;
    pub(crate) const HAS_FEATURES: u32 = HAS_DRIVER | FEATURES_OK;
}
