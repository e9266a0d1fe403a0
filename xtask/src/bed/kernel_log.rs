//! Reads a guest kernel's log for what went wrong in it.
//!
//! It judges only what the kernel itself reports; a user program's crash, which the kernel mentions too, is
//! none of its business.

/// Written to the log when the program starts; see `init.sh`.
const PROGRAM_STARTS: &str = "kvmprep-bed: the program starts";

/// What the kernel prints when it has caught itself in the wrong. Being slow (stall warnings) is not among
/// them: the bed emulates, and shares its CPUs.
const TROUBLE: [&str; 9] = [
    "WARNING: ",
    "BUG: ",
    "Oops: ",
    "Oops[",
    "kernel BUG at ",
    "general protection fault, probably",
    "unable to handle ",
    "UBSAN: ",
    "refcount_t: ",
];

/// What follows "WARNING: " or its like without being the kernel's own fault.
const HARMLESS: [&str; 1] = ["WARNING: Spectre"];

/// The first line, since the program started, in which the kernel reports trouble of its own. Warnings are none that come from
/// a function which is `known` for them.
pub fn trouble<'a>(log: &'a str, known: &[&str]) -> Option<&'a str> {
    let start = log.find(PROGRAM_STARTS)?;
    let is_known = |line: &str| {
        line.contains("WARNING: ") && known.iter().any(|function| line.contains(&format!("{function}+0x")))
    };
    log[start..].lines().find(|line| {
        let hit = TROUBLE.iter().any(|mark| line.contains(mark));
        hit && !HARMLESS.iter().any(|mark| line.contains(mark)) && !is_known(line)
    })
}

/// The line with which a kernel gave up, if it did.
pub fn panic(log: &str) -> Option<&str> {
    log.lines().find(|line| line.contains("Kernel panic - not syncing"))
}

/// The line with which our init gave up, if it did.
pub fn init_failure(log: &str) -> Option<&str> {
    log.lines().find(|line| line.contains("kvmprep-bed: init failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(line: &str) -> String {
        format!(
            "[1.0] WARNING: before the program\n[2.0] kvmprep-bed: the program starts\n[2.1] {line}\n[2.2] end\n"
        )
    }

    #[test]
    fn trouble_while_the_program_ran_is_found() {
        for line in [
            "WARNING: CPU: 1 PID: 80 at arch/x86/kvm/mmu/mmu.c:123 kvm_mmu_map+0x1/0x2 [kvm]",
            "WARNING: arch/x86/kvm/x86.c:77 at kvm_vm_ioctl+0x1/0x2, CPU#0: prog/80",
            "BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
            "kernel BUG at mm/memory.c:1!",
        ] {
            assert!(trouble(&log(line), &["kvm_mmu"]).is_some(), "{line}");
        }
    }

    #[test]
    fn what_came_earlier_or_is_the_programs_own_is_not() {
        for line in [
            "prog[80]: segfault at 0 ip 0000000000401000 sp 00007ffd error 4",
            "traps: prog[80] general protection fault ip:401000 sp:7ffd error:0",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "reboot: Power down",
        ] {
            assert_eq!(trouble(&log(line), &[]), None);
        }
        assert_eq!(trouble("[1.0] WARNING: and the program never ran\n", &[]), None);
    }

    #[test]
    fn a_warning_that_is_known_is_not_but_a_bug_at_the_same_place_is() {
        let at = "at arch/x86/kvm/mmu/tdp_mmu.c:1137 at kvm_tdp_mmu_map+0x5cd/0x7b0 [kvm]";
        let (warning, bug) = (log(&format!("WARNING: {at}")), log(&format!("BUG: {at}")));
        assert!(trouble(&warning, &[]).is_some());
        assert_eq!(trouble(&warning, &["kvm_tdp_mmu_map"]), None);
        assert!(trouble(&bug, &["kvm_tdp_mmu_map"]).is_some());
    }

    #[test]
    fn a_panic_is_found_wherever_it_is() {
        assert!(panic("x\n[1.0] Kernel panic - not syncing: VFS: Unable to mount root\n").is_some());
        assert_eq!(panic("x\n"), None);
    }
}
