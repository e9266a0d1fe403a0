//! The distribution's QEMU on the software model: how far an unchanged VMM comes, and where and why it stops.
//!
//! It is started with `-accel kvm` and the preloaded model, sets its machine's memory up, and asks for the first KVM_RUN, which the
//! model refuses: it executes no guest. Everything before that must have been answered, but for what is on a list here, by name. It
//! says nothing of what a guest would have met.

use crate::bed::{Bed, ResolveError};
use crate::lanes::Lane;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// It comes to its first KVM_RUN in about a second, on a quiet machine.
const TIMEOUT: Duration = Duration::from_secs(300);
/// What QEMU says when it has stopped.
const STOPPED: &str = "kvm run failed Function not implemented";

/// What QEMU asks for on the way that is not modelled, and does without.
const REFUSED: [&str; 1] = ["KVM_IOEVENTFD"];

/// A machine, and the fewest slots that its memory has.
struct Machine {
    name: &'static str,
    arguments: &'static [&'static str],
    slots: usize,
}

const MACHINES: [Machine; 4] = [
    Machine { name: "pc", arguments: &["-M", "pc", "-m", "128"], slots: 4 },
    Machine { name: "q35, 5 GiB", arguments: &["-M", "q35", "-m", "5G"], slots: 5 },
    Machine { name: "microvm", arguments: &["-M", "microvm", "-m", "128"], slots: 2 },
    Machine {
        name: "pc with shared memory, preallocated",
        arguments: &[
            "-M",
            "pc,memory-backend=ram",
            "-m",
            "128",
            "-object",
            "memory-backend-memfd,id=ram,size=128M,share=on,prealloc=on",
        ],
        slots: 4,
    },
];

/// All machines with a model that was built.
pub fn lane(bed: &Bed, model: &Path) -> Lane {
    const NAME: &str = "model-qemu";
    let mut lane = Lane::new(NAME);
    for machine in &MACHINES {
        let qemu = match bed.qemu_preloading(model) {
            Ok(qemu) => qemu,
            Err(ResolveError::Unavailable(why)) => return Lane::skipped(NAME, &why),
            Err(ResolveError::Failed(error)) => {
                lane.check("QEMU", Err(error));
                break;
            }
        };
        lane.check(machine.name, machine.goes_to_its_first_run(qemu));
    }
    lane
}

impl Machine {
    fn goes_to_its_first_run(&self, qemu: Command) -> Result<()> {
        let said = said_until_stopped(self.started_by(qemu))?;
        let requests: Vec<Request> = said.iter().filter_map(|line| Request::of(line)).collect();
        let set = requests.iter().filter(|request| request.name.starts_with("KVM_SET_USER_MEMORY_REGION"));
        ensure!(
            set.clone().count() >= self.slots,
            "only {} slots were set:\n{}",
            set.count(),
            said.join("\n")
        );
        let refused: BTreeSet<&str> =
            requests.iter().filter(|request| request.is_refused()).map(|r| r.name).collect();
        let expected: BTreeSet<&str> = REFUSED.into_iter().chain(["KVM_RUN"]).collect();
        ensure!(
            refused.is_subset(&expected),
            "refused were {refused:?}, not only {expected:?}:\n{}",
            said.join("\n")
        );
        let wrong = set.clone().find(|request| request.answer != "0");
        ensure!(wrong.is_none(), "a slot was refused:\n{}", said.join("\n"));
        // After it QEMU only looks: it shows the registers. (Before it, a KVM_RUN may have been interrupted at once.)
        let is_end = |request: &Request<'_>| request.name == "KVM_RUN" && request.is_refused();
        let run = requests.iter().position(is_end).context("no KVM_RUN was refused")?;
        let after = requests[run + 1..].iter().find(|request| !request.is_a_question());
        ensure!(after.is_none(), "{} came after the first KVM_RUN", after.map_or("", |request| request.name));
        Ok(())
    }

    fn started_by(&self, mut qemu: Command) -> Command {
        // The model has no interrupt controllers, and QEMU none of its own for a vCPU of KVM's.
        qemu.args(["-accel", "kvm,kernel-irqchip=off", "-cpu", "qemu64,apic=off"])
            .args(["-display", "none", "-nodefaults"])
            .args(self.arguments)
            .env("KVMPREP_MODEL_VERBOSE", "1")
            .current_dir(project::root())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        qemu
    }
}

/// A request as the model tells of it.
#[derive(PartialEq, Eq, Debug)]
struct Request<'a> {
    name: &'a str,
    answer: &'a str,
}

impl<'a> Request<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let (_, request) = line.strip_prefix("kvmprep-model: ")?.split_once(": ")?;
        let (request, answer) = request.rsplit_once(" = ")?;
        let name = request.split(' ').next().filter(|name| name.starts_with("KVM_"))?;
        Some(Request { name, answer })
    }

    fn is_a_question(&self) -> bool {
        self.name.starts_with("KVM_GET_") || self.name == "KVM_CHECK_EXTENSION"
    }

    fn is_refused(&self) -> bool {
        self.answer == "ENOSYS"
    }
}

/// What QEMU writes until it has stopped at the guest; then it is ended.
fn said_until_stopped(mut command: Command) -> Result<Vec<String>> {
    let mut qemu = Ended(command.spawn().with_context(|| format!("cannot start {command:?}"))?);
    let lines = lines(&mut qemu.0)?;
    let (started, mut said) = (Instant::now(), Vec::new());
    while !said.last().is_some_and(|line: &String| line.contains(STOPPED)) {
        let left = TIMEOUT.saturating_sub(started.elapsed());
        match lines.recv_timeout(left) {
            Ok(line) => said.push(line),
            Err(_) => anyhow::bail!("QEMU did not come to its first KVM_RUN:\n{}", said.join("\n")),
        }
    }
    // What belongs to the stop comes with it.
    std::thread::sleep(Duration::from_millis(200));
    said.extend(lines.try_iter());
    Ok(said)
}

/// A process that does not outlive this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines(child: &mut Child) -> Result<Receiver<String>> {
    let stderr = child.stderr.take().context("QEMU has no standard error")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_with_their_answers() {
        let line = "kvmprep-model: vCPU 0: KVM_RUN 0x0 = ENOSYS";
        assert_eq!(Request::of(line), Some(Request { name: "KVM_RUN", answer: "ENOSYS" }));
        assert!(Request::of(line).is_some_and(|request| request.is_refused()));
        assert_eq!(Request::of("kvmprep-model: KVM_IOEVENTFD (0x4040ae79) of a VM is not modelled"), None);
        assert_eq!(Request::of("qemu-system-x86_64: warning: nothing"), None);
    }
}
