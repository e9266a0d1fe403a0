//! The numbers and names of KVM's ioctls on x86-64.
//!
//! A request that is not modelled is refused by its name, so every name is here, whether it is modelled or not, with the kinds of
//! objects that KVM has it of. The numbers are the kernel's interface (`linux/kvm.h`); nothing here says what they do.

/// What a request can be of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectKind {
    /// `/dev/kvm`.
    System,
    /// A VM.
    Vm,
    /// A vCPU.
    Vcpu,
}

macro_rules! ioctls {
    ($($name:ident = $number:literal of $($of:ident)*,)*) => {
        $(#[allow(missing_docs, dead_code)] pub const $name: u32 = $number;)*

        /// The names of all.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];

        /// The name of a request, if it is one of KVM's.
        pub fn name_of(request: u32) -> Option<&'static str> {
            match request {
                $($name => Some(stringify!($name)),)*
                _ => None,
            }
        }

        /// Whether a request is one that KVM has of such objects.
        pub fn is_of(request: u32, object: ObjectKind) -> bool {
            match request {
                $($name => [$(ObjectKind::$of),*].contains(&object),)*
                _ => false,
            }
        }
    };
}

ioctls! {
    KVM_GET_API_VERSION = 0x0000ae00 of System,
    KVM_CREATE_VM = 0x0000ae01 of System,
    KVM_GET_MSR_INDEX_LIST = 0xc004ae02 of System,
    KVM_CHECK_EXTENSION = 0x0000ae03 of System Vm,
    KVM_GET_VCPU_MMAP_SIZE = 0x0000ae04 of System,
    KVM_GET_SUPPORTED_CPUID = 0xc008ae05 of System,
    KVM_GET_EMULATED_CPUID = 0xc008ae09 of System,
    KVM_GET_MSR_FEATURE_INDEX_LIST = 0xc004ae0a of System,
    KVM_CREATE_VCPU = 0x0000ae41 of Vm,
    KVM_GET_DIRTY_LOG = 0x4010ae42 of Vm,
    KVM_SET_NR_MMU_PAGES = 0x0000ae44 of Vm,
    KVM_GET_NR_MMU_PAGES = 0x0000ae45 of Vm,
    KVM_SET_USER_MEMORY_REGION = 0x4020ae46 of Vm,
    KVM_SET_TSS_ADDR = 0x0000ae47 of Vm,
    KVM_SET_IDENTITY_MAP_ADDR = 0x4008ae48 of Vm,
    KVM_SET_USER_MEMORY_REGION2 = 0x40a0ae49 of Vm,
    KVM_CREATE_IRQCHIP = 0x0000ae60 of Vm,
    KVM_IRQ_LINE = 0x4008ae61 of Vm,
    KVM_GET_IRQCHIP = 0xc208ae62 of Vm,
    KVM_SET_IRQCHIP = 0x8208ae63 of Vm,
    KVM_CREATE_PIT = 0x0000ae64 of Vm,
    KVM_GET_PIT = 0xc048ae65 of Vm,
    KVM_SET_PIT = 0x8048ae66 of Vm,
    KVM_REGISTER_COALESCED_MMIO = 0x4010ae67 of Vm,
    KVM_IRQ_LINE_STATUS = 0xc008ae67 of Vm,
    KVM_UNREGISTER_COALESCED_MMIO = 0x4010ae68 of Vm,
    KVM_SET_GSI_ROUTING = 0x4008ae6a of Vm,
    KVM_REINJECT_CONTROL = 0x0000ae71 of Vm,
    KVM_IRQFD = 0x4020ae76 of Vm,
    KVM_CREATE_PIT2 = 0x4040ae77 of Vm,
    KVM_SET_BOOT_CPU_ID = 0x0000ae78 of Vm,
    KVM_IOEVENTFD = 0x4040ae79 of Vm,
    KVM_XEN_HVM_CONFIG = 0x4038ae7a of Vm,
    KVM_SET_CLOCK = 0x4030ae7b of Vm,
    KVM_GET_CLOCK = 0x8030ae7c of Vm,
    KVM_RUN = 0x0000ae80 of Vcpu,
    KVM_GET_REGS = 0x8090ae81 of Vcpu,
    KVM_SET_REGS = 0x4090ae82 of Vcpu,
    KVM_GET_SREGS = 0x8138ae83 of Vcpu,
    KVM_SET_SREGS = 0x4138ae84 of Vcpu,
    KVM_TRANSLATE = 0xc018ae85 of Vcpu,
    KVM_INTERRUPT = 0x4004ae86 of Vcpu,
    KVM_GET_MSRS = 0xc008ae88 of System Vcpu,
    KVM_SET_MSRS = 0x4008ae89 of Vcpu,
    KVM_SET_CPUID = 0x4008ae8a of Vcpu,
    KVM_SET_SIGNAL_MASK = 0x4004ae8b of Vcpu,
    KVM_GET_FPU = 0x81a0ae8c of Vcpu,
    KVM_SET_FPU = 0x41a0ae8d of Vcpu,
    KVM_GET_LAPIC = 0x8400ae8e of Vcpu,
    KVM_SET_LAPIC = 0x4400ae8f of Vcpu,
    KVM_SET_CPUID2 = 0x4008ae90 of Vcpu,
    KVM_GET_CPUID2 = 0xc008ae91 of Vcpu,
    KVM_TPR_ACCESS_REPORTING = 0xc028ae92 of Vcpu,
    KVM_SET_VAPIC_ADDR = 0x4008ae93 of Vcpu,
    KVM_GET_MP_STATE = 0x8004ae98 of Vcpu,
    KVM_SET_MP_STATE = 0x4004ae99 of Vcpu,
    KVM_NMI = 0x0000ae9a of Vcpu,
    KVM_SET_GUEST_DEBUG = 0x4048ae9b of Vcpu,
    KVM_X86_SETUP_MCE = 0x4008ae9c of Vcpu,
    KVM_X86_GET_MCE_CAP_SUPPORTED = 0x8008ae9d of System,
    KVM_X86_SET_MCE = 0x4040ae9e of Vcpu,
    KVM_GET_VCPU_EVENTS = 0x8040ae9f of Vcpu,
    KVM_GET_PIT2 = 0x8070ae9f of Vm,
    KVM_SET_VCPU_EVENTS = 0x4040aea0 of Vcpu,
    KVM_SET_PIT2 = 0x4070aea0 of Vm,
    KVM_GET_DEBUGREGS = 0x8080aea1 of Vcpu,
    KVM_SET_TSC_KHZ = 0x0000aea2 of Vm Vcpu,
    KVM_SET_DEBUGREGS = 0x4080aea2 of Vcpu,
    KVM_GET_TSC_KHZ = 0x0000aea3 of Vm Vcpu,
    KVM_ENABLE_CAP = 0x4068aea3 of Vm Vcpu,
    KVM_GET_XSAVE = 0x9000aea4 of Vcpu,
    KVM_SIGNAL_MSI = 0x4020aea5 of Vm,
    KVM_SET_XSAVE = 0x5000aea5 of Vcpu,
    KVM_GET_XCRS = 0x8188aea6 of Vcpu,
    KVM_SET_XCRS = 0x4188aea7 of Vcpu,
    KVM_GET_ONE_REG = 0x4010aeab of Vcpu,
    KVM_SET_ONE_REG = 0x4010aeac of Vcpu,
    KVM_KVMCLOCK_CTRL = 0x0000aead of Vcpu,
    KVM_SET_PMU_EVENT_FILTER = 0x4020aeb2 of Vm,
    KVM_SMI = 0x0000aeb7 of Vcpu,
    KVM_MEMORY_ENCRYPT_OP = 0xc008aeba of Vm Vcpu,
    KVM_MEMORY_ENCRYPT_REG_REGION = 0x8010aebb of Vm,
    KVM_MEMORY_ENCRYPT_UNREG_REGION = 0x8010aebc of Vm,
    KVM_HYPERV_EVENTFD = 0x4018aebd of Vm,
    KVM_GET_NESTED_STATE = 0xc080aebe of Vcpu,
    KVM_SET_NESTED_STATE = 0x4080aebf of Vcpu,
    KVM_CLEAR_DIRTY_LOG = 0xc018aec0 of Vm,
    KVM_GET_SUPPORTED_HV_CPUID = 0xc008aec1 of System Vcpu,
    KVM_X86_SET_MSR_FILTER = 0x4188aec6 of Vm,
    KVM_RESET_DIRTY_RINGS = 0x0000aec7 of Vm,
    KVM_XEN_HVM_GET_ATTR = 0xc048aec8 of Vm,
    KVM_XEN_HVM_SET_ATTR = 0x4048aec9 of Vm,
    KVM_XEN_VCPU_GET_ATTR = 0xc048aeca of Vcpu,
    KVM_XEN_VCPU_SET_ATTR = 0x4048aecb of Vcpu,
    KVM_GET_SREGS2 = 0x8140aecc of Vcpu,
    KVM_SET_SREGS2 = 0x4140aecd of Vcpu,
    KVM_GET_STATS_FD = 0x0000aece of Vm Vcpu,
    KVM_GET_XSAVE2 = 0x9000aecf of Vcpu,
    KVM_XEN_HVM_EVTCHN_SEND = 0x400caed0 of Vm,
    KVM_SET_MEMORY_ATTRIBUTES = 0x4020aed2 of Vm,
    KVM_CREATE_GUEST_MEMFD = 0xc040aed4 of Vm,
    KVM_PRE_FAULT_MEMORY = 0xc040aed5 of Vcpu,
    KVM_CREATE_DEVICE = 0xc00caee0 of Vm,
    KVM_SET_DEVICE_ATTR = 0x4018aee1 of Vcpu,
    KVM_GET_DEVICE_ATTR = 0x4018aee2 of System Vcpu,
    KVM_HAS_DEVICE_ATTR = 0x4018aee3 of System Vcpu,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::size_of;

    const NONE: u32 = 0;
    const TO_KERNEL: u32 = 1;
    const FROM_KERNEL: u32 = 2;

    const fn number(direction: u32, number: u32, size: usize) -> u32 {
        direction << 30 | (size as u32) << 16 | 0xae << 8 | number
    }

    #[test]
    fn the_numbers_are_made_of_the_structures_sizes() {
        use kvm_bindings::*;
        assert_eq!(KVM_RUN, number(NONE, 0x80, 0));
        assert_eq!(
            KVM_SET_USER_MEMORY_REGION2,
            number(TO_KERNEL, 0x49, size_of::<kvm_userspace_memory_region2>())
        );
        assert_eq!(
            KVM_PRE_FAULT_MEMORY,
            number(TO_KERNEL | FROM_KERNEL, 0xd5, size_of::<kvm_pre_fault_memory>())
        );
        assert_eq!(
            KVM_CREATE_GUEST_MEMFD,
            number(TO_KERNEL | FROM_KERNEL, 0xd4, size_of::<kvm_create_guest_memfd>())
        );
        assert_eq!(KVM_SET_MEMORY_ATTRIBUTES, number(TO_KERNEL, 0xd2, size_of::<kvm_memory_attributes>()));
        assert_eq!(KVM_GET_SREGS, number(FROM_KERNEL, 0x83, size_of::<kvm_sregs>()));
        assert_eq!(KVM_SET_VCPU_EVENTS, number(TO_KERNEL, 0xa0, size_of::<kvm_vcpu_events>()));
    }

    #[test]
    fn a_number_has_its_name() {
        assert_eq!(name_of(0xae60), Some("KVM_CREATE_IRQCHIP"));
        assert_eq!(name_of(0x5401), None);
        assert!(is_of(KVM_CREATE_IRQCHIP, ObjectKind::Vm) && !is_of(KVM_CREATE_IRQCHIP, ObjectKind::Vcpu));
    }
}
