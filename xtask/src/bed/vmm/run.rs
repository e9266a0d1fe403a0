//! Runs cases in the bed: one outer guest with real KVM, in which QEMU runs one inner Linux guest after the other.
//!
//! The inner guest's kernel is the bed's own small one: it boots within seconds under two emulations, and is an
//! ordinary Linux all the same. A case that fails is told with its reason and leaves the others be.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::super::progress::{self, Step};
use super::build::Built;
use super::case::{Case, PATCHED, PLAIN, PRIVATE, Phase};
use super::converter;
use super::observed::{Figures, Observed};
use crate::bed::{self, Bed, Guest, Kernel, ResolveError, ResolvedKernel, initramfs};

const DRIVE: &str = include_str!("drive.sh");
const INNER_INIT: &str = include_str!("inner-init.sh");

/// The outer guest's memory: QEMU with its 256 MiB, and the file that another was saved to.
const OUTER_MEMORY_MIB: u64 = 1536;

/// The outer guest's CPUs. The inner one has two; but where several of the emulated CPUs run a guest of their own at
/// once, QEMU's emulation fails now and then: the inner or the outer guest resets or hangs.
const OUTER_CPUS: u32 = 1;

/// What a case may take, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// What one case came to.
pub struct Done {
    pub case: Case,
    pub result: Result<Figures>,
}

/// The kernels of both guests. The inner one's is also that of the outer one where there is to be private memory, which
/// no distribution's kernel has.
pub struct Kernels {
    outer: ResolvedKernel,
    inner: ResolvedKernel,
}

impl Kernels {
    /// Takes them from the bed.
    pub fn resolve(bed: &Bed) -> Result<Self, ResolveError> {
        Ok(Kernels { outer: bed.resolve(&Kernel::named("newest")?)?, inner: bed.resolve(&Kernel::Private)? })
    }

    /// The version of the kernel whose KVM it is.
    pub fn outer_version(&self) -> &str {
        &self.outer.version
    }
}

/// Runs `cases`, in their order. Each machine and phase has an outer guest of its own: in one that has run for long
/// memory is fragmented, and what hangs takes the rest along.
pub fn run(bed: &Bed, kernels: &Kernels, built: &Built, cases: &[Case]) -> Result<Vec<Done>> {
    let mut done = Vec::new();
    for together in cases.chunk_by(|a, b| (a.machine, a.phase) == (b.machine, b.phase)) {
        done.extend(run_together(bed, kernels, built, together)?);
    }
    Ok(done)
}

fn run_together(bed: &Bed, kernels: &Kernels, built: &Built, cases: &[Case]) -> Result<Vec<Done>> {
    let files = tempfile::tempdir()?;
    let guest = outer_guest(bed, kernels, built, cases, files.path())?;
    let mut reader = Reader::new(cases);
    let has_private_memory = cases.iter().any(|case| case.phase == Phase::Convert);
    let kernel = if has_private_memory { &kernels.inner } else { &kernels.outer };
    let outcome = bed::run(bed, kernel, &guest, &mut |line| reader.take(line));
    reader.step = None;
    let outcome = outcome?;
    let said = reader.rest.join("\n");
    ensure!(outcome.status == 0, "the driver ended with status {}:\n{said}", outcome.status);
    if let Some(oops) = outcome.oops {
        return Err(anyhow!("the outer kernel reported trouble: {oops}\n{said}"));
    }
    ensure!(reader.done.len() == cases.len(), "{} of {} cases ran:\n{said}", reader.done.len(), cases.len());
    Ok(reader.done)
}

fn outer_guest(bed: &Bed, kernels: &Kernels, built: &Built, cases: &[Case], files: &Path) -> Result<Guest> {
    let mut guest = Guest::new(["sh", "/drive.sh"]);
    guest.memory_mib = OUTER_MEMORY_MIB;
    guest.cpus = OUTER_CPUS;
    guest.timeout = PATIENCE * u32::try_from(cases.len() + 1)?;
    guest.add(&built.plain, PLAIN, &[])?;
    guest.add(&built.patched, PATCHED, &[&built.libraries])?;
    guest.add(&built.private, PRIVATE, &[&built.libraries])?;
    let (drive, list, archive) = (files.join("drive.sh"), files.join("cases"), files.join("inner.cpio"));
    fs::write(&drive, DRIVE)?;
    fs::write(&list, cases.iter().map(Case::line).collect::<String>())?;
    initramfs::write_small(&archive, INNER_INIT, &bed.qemu()?.busybox())?;
    for (file, inside) in [
        (&drive, "/drive.sh"),
        (&list, "/cases"),
        (&archive, "/inner.cpio"),
        (&kernels.inner.image, "/vmlinuz"),
        (&converter::build(files)?, converter::INSIDE),
    ] {
        guest.add(file, inside, &[])?;
    }
    for rom in fs::read_dir(bed.qemu()?.firmware())? {
        let rom = rom?;
        guest.add(&rom.path(), &format!("/firmware/{}", rom.file_name().to_string_lossy()), &[])?;
    }
    Ok(guest)
}

/// Takes the driver's lines apart.
struct Reader<'a> {
    cases: &'a [Case],
    current: Option<Case>,
    observed: Observed,
    done: Vec<Done>,
    /// What is no line of the driver's: said by the kernel, or by a tool that failed.
    rest: Vec<String>,
    step: Option<Step>,
}

impl<'a> Reader<'a> {
    fn new(cases: &'a [Case]) -> Self {
        Reader {
            cases,
            current: None,
            observed: Observed::default(),
            done: Vec::new(),
            rest: Vec::new(),
            step: Some(progress::step("booting the outer guest")),
        }
    }

    fn take(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("case", name)) => {
                self.current = self.cases.iter().find(|case| case.to_string() == name).copied();
                self.observed = Observed::default();
                // One at a time: the last is over before the next is announced.
                self.step = None;
                let (number, all) = (self.done.len() + 1, self.cases.len());
                self.step = Some(progress::step(&format!("{number} of {all}: {name}")));
            }
            Some(("done", _)) => self.finish(None),
            Some(("failed", why)) => self.finish(Some(why)),
            _ if self.observed.take(line) => {}
            _ => self.rest.push(line.to_string()),
        }
    }

    fn finish(&mut self, failure: Option<&str>) {
        let Some(case) = self.current.take() else { return };
        let result = match failure {
            Some(why) => Err(anyhow!("{why}")),
            None => self.observed.figures(),
        };
        self.done.push(Done { case, result });
    }
}
