//! What is modelled, as the environment says it: the kernel, the types of virtual machines, failures.
//!
//! A program may change its mind by `kvmprep-model.h` until the machine is made. A value that is not understood ends the program at
//! its start, with a message that says what is: a test that runs with other settings than it was given would be believed.

use crate::failing::{self, Plan};
use crate::{cpuid, host, say};
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::units::Level;
use kvmprep_model::vm::Machine;
use std::env;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

pub use crate::failing::of_ioctl as failure_of_ioctl;

/// The kernels, the newest first.
const KERNELS: [(&str, Version); 5] = [
    ("7.3", Version(7, 3)),
    ("7.2", Version(7, 2)),
    ("6.18", Version(6, 18)),
    ("6.12", Version(6, 12)),
    ("6.1", Version(6, 1)),
];

const VM_TYPES: [(&str, VmType); 4] = [
    ("default", VmType::Default),
    ("sw_protected", VmType::SwProtected),
    ("tdx", VmType::Tdx),
    ("snp", VmType::Snp),
];

/// What is modelled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The kernel and the processor.
    pub personality: Personality,
    /// Whether each ioctl is written to the standard error.
    pub is_verbose: bool,
    vm_types: Vec<VmType>,
    failures: Vec<Plan>,
}

/// What holds now, and whether it holds for good.
struct Current {
    settings: Option<&'static Settings>,
    is_fixed: bool,
}

static CURRENT: RwLock<Current> = RwLock::new(Current { settings: None, is_fixed: false });

/// What a variable's name begins with, and how they go on.
const PREFIX: &str = "KVMPREP_MODEL_";
const VARIABLES: [&str; 4] = ["KERNEL", "VM_TYPES", "FAIL", "VERBOSE"];

/// Reads the environment when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static READ: extern "C" fn() = {
    extern "C" fn read() {
        for name in env::vars_os().filter_map(|(name, _)| name.into_string().ok()) {
            if let Some(why) = unknown(&name) {
                say::line(format_args!("{why}"));
            }
        }
        current();
    }
    read
};

/// What is modelled.
pub fn current() -> &'static Settings {
    if let Some(settings) = CURRENT.read().unwrap_or_else(PoisonError::into_inner).settings {
        return settings;
    }
    // What is no text is no name of anything either, and will be complained of.
    let variable = |name: &str| env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let settings = Settings::of(variable).unwrap_or_else(|why| say::end_before_begin(format_args!("{why}")));
    write().settings.get_or_insert_with(|| Box::leak(Box::new(settings)))
}

/// Why a variable is not the model's, though it looks so: it may have been mistyped. It may be a build's, so nothing is ended.
fn unknown(name: &str) -> Option<String> {
    let rest = name.strip_prefix(PREFIX).filter(|rest| !VARIABLES.contains(rest))?;
    let known = VARIABLES.join(", ");
    Some(format!(
        "{name} is set, which says nothing to the model: {PREFIX} can go on with {known}, not {rest}"
    ))
}

/// Models another kernel: EBUSY when the machine is made.
pub fn set_kernel(name: &str) -> Result<()> {
    change(|settings| {
        let version = kernel(name)?;
        Ok(Settings { personality: personality(version, &settings.vm_types), ..settings.clone() })
    })
}

/// Has further calls fail once the machine is made, or without any none: EBUSY when it is.
pub fn plan(plans: &[Plan]) -> Result<()> {
    change(|settings| {
        let before = if plans.is_empty() { &[][..] } else { &settings.failures };
        Ok(Settings { failures: [before, plans].concat(), ..settings.clone() })
    })
}

/// Offers other types of virtual machines: EBUSY when the machine is made.
pub fn set_vm_types(names: &str) -> Result<()> {
    change(|settings| {
        let vm_types = vm_types(names)?;
        let personality = personality(settings.personality.version, &vm_types);
        Ok(Settings { personality, vm_types, ..settings.clone() })
    })
}

fn change(new: impl FnOnce(&Settings) -> std::result::Result<Settings, String>) -> Result<()> {
    let settings = new(current()).map_err(|why| {
        say::line(format_args!("{why}"));
        Errno::EINVAL
    })?;
    let mut current = write();
    if current.is_fixed {
        return Err(Errno::EBUSY);
    }
    // The few that a program ever makes are kept: whoever has the last ones may still look at them.
    current.settings = Some(Box::leak(Box::new(settings)));
    Ok(())
}

fn write() -> RwLockWriteGuard<'static, Current> {
    CURRENT.write().unwrap_or_else(PoisonError::into_inner)
}

impl Settings {
    fn of(variable: impl Fn(&str) -> Option<String>) -> std::result::Result<Self, String> {
        let read = |name: &str| variable(name).filter(|value| !value.is_empty());
        let of = |name: &str, why: String| format!("{name}: {why}");
        let version = match read("KVMPREP_MODEL_KERNEL") {
            Some(name) => kernel(&name).map_err(|why| of("KVMPREP_MODEL_KERNEL", why))?,
            None => KERNELS[0].1,
        };
        let vm_types = match read("KVMPREP_MODEL_VM_TYPES") {
            Some(names) => vm_types(&names).map_err(|why| of("KVMPREP_MODEL_VM_TYPES", why))?,
            None => VmType::ALL.to_vec(),
        };
        let failures = failing::parse(&read("KVMPREP_MODEL_FAIL").unwrap_or_default());
        let is_verbose = match read("KVMPREP_MODEL_VERBOSE").as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => return Err(format!("KVMPREP_MODEL_VERBOSE: '{other}' should be 0 or 1")),
        };
        Ok(Settings {
            personality: personality(version, &vm_types),
            is_verbose,
            vm_types,
            failures: failures.map_err(|why| of("KVMPREP_MODEL_FAIL", why))?,
        })
    }

    /// Whether virtual machines of this type are offered, if the kernel has them.
    pub fn has_vm_type(&self, vm_type: VmType) -> bool {
        self.vm_types.contains(&vm_type)
    }

    /// The machine is made: from now on nothing changes. The failures that the environment asks for begin.
    pub fn arm(&self, machine: &Machine) {
        write().is_fixed = true;
        failing::arm(&self.failures, machine);
    }
}

fn kernel(name: &str) -> std::result::Result<Version, String> {
    let found = KERNELS.iter().find(|(known, _)| *known == name).map(|(_, version)| *version);
    found.ok_or_else(|| format!("'{name}' should be a kernel that is modelled: {}", names(&KERNELS)))
}

fn vm_types(list: &str) -> std::result::Result<Vec<VmType>, String> {
    let one = |name: &str| {
        let found = VM_TYPES.iter().find(|(known, _)| *known == name).map(|(_, vm_type)| *vm_type);
        found.ok_or_else(|| format!("'{name}' should be a type of virtual machines: {}", names(&VM_TYPES)))
    };
    list.split(',').map(str::trim).map(one).collect()
}

fn names<T>(known: &[(&str, T)]) -> String {
    known.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

/// A kernel that was compiled for these types, on this processor.
fn personality(version: Version, vm_types: &[VmType]) -> Personality {
    /// Bit 26 of EDX.
    const PAGES_OF_1G: u32 = 1 << 26;
    let largest_page =
        if cpuid::leaf(0x8000_0001, 0).edx & PAGES_OF_1G != 0 { Level::GIGANTIC } else { Level::HUGE };
    Personality {
        version,
        has_sw_protected: vm_types.contains(&VmType::SwProtected),
        has_attributes: vm_types.iter().any(|vm_type| vm_type.has_private_memory()),
        has_accessed_dirty: true,
        address_bits: cpuid::leaf(0x8000_0008, 0).eax & 0xff,
        user_address_bits: host::user_address_bits(),
        largest_page,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> std::result::Result<Settings, String> {
        Settings::of(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_a_word_all_of_the_newest_kernel_is_modelled() {
        for nothing in [read(&[]), read(&[("KVMPREP_MODEL_KERNEL", "")])] {
            let settings = nothing.unwrap();
            assert_eq!(settings.personality.version, Version(7, 3));
            assert!(VmType::ALL.into_iter().all(|vm_type| settings.has_vm_type(vm_type)));
            assert!(!settings.is_verbose && settings.failures.is_empty());
        }
    }

    #[test]
    fn what_the_environment_says_holds() {
        let settings = read(&[
            ("KVMPREP_MODEL_KERNEL", "6.12"),
            ("KVMPREP_MODEL_VM_TYPES", "default, tdx"),
            ("KVMPREP_MODEL_FAIL", "mem_page_aug:3:busy"),
            ("KVMPREP_MODEL_VERBOSE", "1"),
        ])
        .unwrap();
        assert_eq!(settings.personality.version, Version(6, 12));
        assert!(settings.has_vm_type(VmType::Tdx) && !settings.has_vm_type(VmType::SwProtected));
        assert!(settings.is_verbose && settings.failures.len() == 1);
        assert!(!settings.personality.has_sw_protected && settings.personality.has_attributes);
        let ordinary = read(&[("KVMPREP_MODEL_VM_TYPES", "default")]).unwrap();
        assert!(!ordinary.personality.has_memory_attributes());
    }

    #[test]
    fn what_is_not_understood_is_explained() {
        for (variable, value, told) in [
            ("KVMPREP_MODEL_KERNEL", "5.10", "7.3, 7.2, 6.18, 6.12, 6.1"),
            ("KVMPREP_MODEL_VM_TYPES", "default,sev", "default, sw_protected, tdx, snp"),
            ("KVMPREP_MODEL_FAIL", "page:1:busy", "mem_page_add"),
            ("KVMPREP_MODEL_VERBOSE", "yes", "0 or 1"),
        ] {
            let why = read(&[(variable, value)]).unwrap_err();
            assert!(why.starts_with(variable) && why.contains(told), "{why}");
        }
    }

    #[test]
    fn variables_that_were_mistyped_are_noticed() {
        let why = unknown("KVMPREP_MODEL_KERNAL").unwrap();
        assert!(why.starts_with("KVMPREP_MODEL_KERNAL is set") && why.contains("KERNEL, VM_TYPES"), "{why}");
        for known in ["KVMPREP_MODEL_KERNEL", "KVMPREP_MODEL_FAIL", "KVMPREP_OTHER", "PATH"] {
            assert_eq!(unknown(known), None);
        }
    }

    #[test]
    fn a_program_may_choose_until_the_machine_is_made() {
        let before = current().clone();
        set_kernel("6.1").unwrap();
        assert_eq!(current().personality.version, Version(6, 1));
        set_vm_types("default").unwrap();
        assert_eq!(current().personality.version, Version(6, 1));
        assert!(!current().has_vm_type(VmType::Snp));
        assert_eq!(set_kernel("6.13"), Err(Errno::EINVAL));
        write().settings = Some(Box::leak(Box::new(before)));
    }
}
