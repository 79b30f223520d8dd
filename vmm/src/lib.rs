//! The machine: one KVM virtual machine in one process. Knows nothing of containers or hostd.
//!
//! [`spec`] is what is asked for, [`plan`] is what will be done, [`machine`] does it.

/// Shows a type's name alone, where the content is devices and descriptors.
macro_rules! opaque_debug {
    ($name:ident $(<$parameter:ident>)?) => {
        impl $(<$parameter>)? std::fmt::Debug for $name $(<$parameter>)? {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    };
}

pub mod arch;
pub mod assembly;
pub mod boot;
pub mod bus;
pub mod console;
pub mod containment;
pub mod control;
pub mod descriptors;
pub mod devices;
pub mod dirty;
pub mod events;
pub mod exit;
pub mod fair_mutex;
pub mod footprint;
pub mod guest_status;
pub mod hotplug;
pub mod inventory;
pub mod kvm;
pub mod layout;
pub mod listen;
pub mod machine;
pub mod memory;
pub mod pci;
pub mod plan;
pub mod platform;
pub mod rate_limit;
pub mod seccomp;
pub mod signals;
pub mod snapshot;
pub mod spec;
pub mod terminal;
pub mod vcpu;
pub mod virtio;
