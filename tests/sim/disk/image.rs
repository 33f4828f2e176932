//! What a crash may leave of a disk, chosen sector by sector instead of by chance.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

use vhost_remap::device::{Op, OpKind};
use vhost_remap::volume::layout::PAGE;

use super::store::{Content, Volatile};
use super::{Disk, NEVER, sectors};
use crate::guest::SECTOR;

impl Disk {
    /// What an operation under way writes, as one more write that no flush has covered; its number.
    pub(crate) fn land(&mut self, op: &Op) -> Option<u64> {
        let writes = matches!(op.kind, OpKind::Write | OpKind::WriteZeroes { .. } | OpKind::Discard);
        let (first, last) = sectors(op);
        if !writes || last > self.current.len() {
            return None;
        }
        self.completed += 1;
        for (sector, content) in (first..last).zip(self.data(op)) {
            self.put(sector, content, self.completed);
        }
        Some(self.completed)
    }

    /// The writes that no flush covers, by number, with their sectors. Those that a failed flush has dropped
    /// are not among them: no power cut leaves them.
    pub(crate) fn unflushed(&self) -> BTreeMap<u64, Vec<usize>> {
        let mut writes: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for volatile in self.cache.iter() {
            for (number, _) in volatile.later.iter().filter(|(number, _)| *number != NEVER) {
                writes.entry(*number).or_default().push(volatile.sector);
            }
        }
        writes
    }

    /// The power goes. Of what no flush covered there is left what `kept` names: the write's number, the sector.
    pub(crate) fn cut(&mut self, kept: impl Fn(u64, usize) -> bool) {
        for volatile in self.cache.take() {
            let left = |(number, _): &&(u64, _)| *number != NEVER && kept(*number, volatile.sector);
            self.current[volatile.sector] =
                volatile.later.iter().rfind(left).map_or(volatile.durable, |(_, content)| *content);
        }
        self.reverted |= self.dropped;
        (self.dropped, self.dropped_data) = (false, false);
    }

    /// The process goes, and with it those writes under way that `undone` names.
    pub(crate) fn undo(&mut self, undone: impl Fn(u64, usize) -> bool) {
        let current = &mut self.current;
        self.cache.retain(|volatile| {
            volatile.later.retain(|(number, _)| !undone(*number, volatile.sector));
            current[volatile.sector] = volatile.later.last().map_or(volatile.durable, |(_, content)| *content);
            !volatile.later.is_empty()
        });
    }

    /// Equal for disks with the same content that keep the same through every crash.
    pub(crate) fn fingerprint(&self, hasher: &mut impl Hasher) {
        (self.dropped, self.dropped_data, self.reverted, self.cache.len()).hash(hasher);
        for (sector, content) in self.current.iter().enumerate().filter(|(_, content)| **content != 0) {
            (sector, self.words(*content)).hash(hasher);
        }
        for Volatile { sector, durable, later } in self.cache.iter() {
            (sector, self.words(*durable)).hash(hasher);
            later.iter().for_each(|(number, content)| (*number == NEVER, self.words(*content)).hash(hasher));
        }
    }

    /// A page of metadata as it reads now.
    pub(crate) fn page(&self, offset: u64) -> [u8; PAGE] {
        let first = usize::try_from(offset).expect("small disks") / SECTOR;
        let mut page = [0; PAGE];
        for (content, bytes) in self.current[first..].iter().zip(page.chunks_exact_mut(SECTOR)) {
            self.store.copy(*content, bytes);
        }
        page
    }

    /// A number for a sector's bytes.
    fn words(&self, content: Content) -> u64 {
        let mut bytes = [0; SECTOR];
        self.store.copy(content, &mut bytes);
        bytes.chunks_exact(8).fold(0, |sum: u64, word| {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
        })
    }
}
