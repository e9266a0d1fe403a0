//! What an agent knows of each host frame: whose it is.
//!
//! There is one such table a machine, whatever guests there are, and it is asked by every thread that maps. So it is in
//! parts that are locked apart. It must not be asked about one frame from within an answer about another.

use std::collections::HashMap;
use std::sync::PoisonError;

use crate::sync::plain::Mutex;
use crate::units::Pfn;

/// Neighbours are in the same part: a guest's frames mostly lie together, and another vCPU's further away.
const NEIGHBOURS: u64 = 512;
const PARTS: usize = 64;

/// One entry for each frame that is not as every frame was at first.
#[derive(Debug)]
pub struct FrameTable<T> {
    parts: Vec<Mutex<HashMap<Pfn, T>>>,
}

impl<T> Default for FrameTable<T> {
    fn default() -> Self {
        FrameTable { parts: (0..PARTS).map(|_| Mutex::default()).collect() }
    }
}

impl<T> FrameTable<T> {
    /// Looks at an entry and changes it, while nobody else does.
    pub fn with<R>(&self, pfn: Pfn, look: impl FnOnce(&mut Option<T>) -> R) -> R {
        let part = &self.parts[(pfn.0 / NEIGHBOURS) as usize % PARTS];
        let mut part = part.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entry = part.remove(&pfn);
        let answer = look(&mut entry);
        if let Some(entry) = entry {
            part.insert(pfn, entry);
        }
        answer
    }

    /// How many frames have an entry that is so.
    pub fn count(&self, is_so: impl Fn(Pfn, &T) -> bool) -> u64 {
        let count_part = |part: &Mutex<HashMap<Pfn, T>>| {
            let part = part.lock().unwrap_or_else(PoisonError::into_inner);
            part.iter().filter(|(pfn, entry)| is_so(**pfn, entry)).count() as u64
        };
        self.parts.iter().map(count_part).sum()
    }
}

impl<T: Copy> FrameTable<T> {
    /// A frame's entry.
    pub fn get(&self, pfn: Pfn) -> Option<T> {
        let part = self.parts[(pfn.0 / NEIGHBOURS) as usize % PARTS].lock();
        part.unwrap_or_else(PoisonError::into_inner).get(&pfn).copied()
    }
}
