//! A virtual machine for tests of launching that is only what launching asks for, and does as the test says.
//!
//! It has one slot and one file, and the MMU's tables where there are mirrored ones. What the commands answer to a whole
//! virtual machine is tested with that one (`tests/confidential`).

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::confidential::{Held, ImageTarget};
use crate::errno::{Errno, Result};
use crate::host::simulated::{Place, Protection, Settings, SimulatedHost, Source};
use crate::host::{FileFrames, HostMemory};
use crate::mmu::{self, AccessKind, ExternalTable, MapResult, Mapping, Mirroring, Mmu, Role, Root};
use crate::personality::{Personality, Version};
use crate::snp::SnpTarget;
use crate::tdx::{TdxVcpuTarget, TdxVmTarget};
use crate::units::{Gfn, Hva, Level, PAGE_SIZE, Pfn};

/// The slot's first frame.
pub(crate) const BASE: Gfn = Gfn(0x200);
/// Its pages.
pub(crate) const PAGES: u64 = 16;
/// The kernel.
pub(crate) const NEWEST: Version = Version(7, 3);

/// What a test can say.
#[derive(Default)]
pub(crate) struct Setup {
    /// The slot's file was closed.
    pub is_closed: bool,
    /// Frames that are not private.
    pub shared: HashSet<Gfn>,
    /// A signal comes before this many more questions for one.
    pub signal_after: Option<u64>,
    /// The thread was killed.
    pub is_killed: bool,
    /// vCPUs that there are.
    pub vcpus: usize,
    /// The vCPU's CPUID lacks the x2APIC.
    pub lacks_x2apic: bool,
    /// The virtual machine is dead.
    pub is_dead: bool,
    /// The kernel, if not the newest.
    pub version: Option<Version>,
}

pub(crate) struct Fake {
    pub host: Arc<SimulatedHost>,
    /// Memory of the VMM's, in which page n begins with the word n + 1.
    pub memory: Hva,
    pub mmu: Mmu,
    personality: Personality,
    frames: Box<dyn FileFrames>,
    setup: Arc<Mutex<Setup>>,
}

/// The host of a machine, to be given to module or firmware before there is a virtual machine.
pub(crate) fn host() -> Arc<SimulatedHost> {
    SimulatedHost::new(Settings::new(NEWEST))
}

impl Fake {
    pub fn new(
        host: Arc<SimulatedHost>,
        setup: Arc<Mutex<Setup>>,
        external: Option<Arc<dyn ExternalTable>>,
    ) -> Self {
        let personality = Personality::with_everything(setup.lock().unwrap().version.unwrap_or(NEWEST));
        let place = Place::Somewhere { boundary: Level::SMALL, offset: 0 };
        let size = PAGES * PAGE_SIZE;
        let memory = host.map(place, size, Protection::READ_WRITE, Source::Anonymous).unwrap();
        for page in 0..PAGES {
            host.write(memory.plus_pages(page), page + 1).unwrap();
        }
        let frames = host.new_file(PAGES).unwrap();
        let mmu = Mmu::new(mmu::Settings::of(&personality), external);
        Fake { host, memory, mmu, personality, frames, setup }
    }

    pub fn setup(&self) -> MutexGuard<'_, Setup> {
        self.setup.lock().unwrap()
    }

    /// The address of a page of the VMM's memory.
    pub fn source(&self, page: u64) -> u64 {
        self.memory.plus_pages(page).0
    }

    /// The frame that the file has for a page of the slot.
    pub fn frame(&self, page: u64) -> Pfn {
        self.frames.allocate(page).unwrap()
    }

    /// The tables of private memory.
    pub fn private_root(&self) -> Root {
        self.mmu.root(Role::new(&self.personality, false, Mirroring::Mirror, Gfn(0)))
    }

    /// Maps a private page once, as a pre-fault does.
    pub fn map(&self, gfn: Gfn, pfn: Pfn) -> MapResult {
        let mapping = Mapping {
            gfn,
            pfn,
            goal_level: Level::SMALL,
            kind: AccessKind::Read,
            is_prefetch: true,
            is_writable: true,
            dirty_log: None,
        };
        self.mmu.lock_shared().map(&self.private_root(), &mapping)
    }

    fn lock(&self) -> Result<Box<dyn Held + '_>> {
        if self.setup().is_killed { Err(Errno::EINTR) } else { Ok(Box::new(())) }
    }
}

impl ImageTarget for Fake {
    fn host(&self) -> &dyn HostMemory {
        &*self.host
    }

    fn is_signal_pending(&self) -> bool {
        match &mut self.setup().signal_after {
            Some(0) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        }
    }

    fn backed_pages(&self, gfn: Gfn) -> Result<u64> {
        if gfn < BASE || gfn >= BASE.plus(PAGES) {
            return Err(Errno::EINVAL);
        }
        if self.setup().is_closed { Err(Errno::EFAULT) } else { Ok(BASE.0 + PAGES - gfn.0) }
    }

    fn fill_page(&self, gfn: Gfn, fill: &mut dyn FnMut(Pfn) -> Result<()>) -> Result<()> {
        if self.setup().shared.contains(&gfn) {
            return Err(Errno::EINVAL);
        }
        fill(self.frame(gfn.0 - BASE.0))
    }
}

impl TdxVmTarget for Fake {
    fn lock_state(&self) -> Result<Box<dyn Held + '_>> {
        self.lock()
    }

    fn has_vcpus(&self) -> bool {
        self.setup().vcpus > 0
    }

    fn has_five_levels(&self) -> bool {
        false
    }
}

impl TdxVcpuTarget for Fake {
    fn lock_state(&self) -> Result<Box<dyn Held + '_>> {
        self.lock()
    }

    fn has_x2apic(&self) -> bool {
        !self.setup().lacks_x2apic
    }

    fn map_private(&self, gfn: Gfn, pfn: Pfn) -> Result<()> {
        loop {
            if self.setup().is_dead {
                return Err(Errno::EIO);
            }
            match self.map(gfn, pfn) {
                MapResult::Fixed => return Ok(()),
                MapResult::Retry => {}
                MapResult::Spurious | MapResult::Bug => return Err(Errno::EIO),
            }
        }
    }

    fn lock_mmu(&self) -> Box<dyn Held + '_> {
        Box::new(self.mmu.lock_exclusive())
    }
}

impl SnpTarget for Fake {
    fn personality(&self) -> &Personality {
        &self.personality
    }

    fn lock_slots(&self) -> Box<dyn Held + '_> {
        Box::new(())
    }

    fn lock_vcpus(&self) -> Result<Box<dyn Held + '_>> {
        self.lock()
    }

    fn vcpus(&self) -> usize {
        self.setup().vcpus
    }
}
