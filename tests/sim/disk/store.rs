//! What sectors hold, and what a power cut may make of it.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::guest::{self, SECTOR};

/// A sector's bytes: the word that they repeat, or else their place in a [`Store`] with [`STORED`] set.
pub(super) type Content = u64;

/// Set in the content of a sector that is not one word again and again. No guest writes it.
const STORED: u64 = 1 << 63;

/// All contents of more than one word that sectors of a disk ever had. Runs are short: nothing is forgotten.
#[derive(Clone, Debug, Default)]
pub(super) struct Store {
    /// Shared by the copies of a disk, as far as they had come when they were made.
    chunks: Vec<Arc<Vec<[u8; SECTOR]>>>,
}

impl Store {
    const CHUNK: usize = 32;

    pub(super) fn keep(&mut self, bytes: &[u8]) -> Content {
        match guest::uniform(bytes) {
            Some(word) if word & STORED == 0 => return word,
            _ => {}
        }
        if self.chunks.last().is_none_or(|chunk| chunk.len() == Self::CHUNK) {
            self.chunks.push(Arc::new(Vec::with_capacity(Self::CHUNK)));
        }
        let full = (self.chunks.len() - 1) * Self::CHUNK;
        let chunk = Arc::make_mut(self.chunks.last_mut().expect("just made"));
        chunk.push(bytes.try_into().expect("a sector"));
        STORED | (full + chunk.len() - 1) as u64
    }

    pub(super) fn copy(&self, content: Content, to: &mut [u8]) {
        match content & STORED {
            0 => guest::fill_with(to, content),
            _ => {
                let at = usize::try_from(content & !STORED).expect("kept by us");
                to.copy_from_slice(&self.chunks[at / Self::CHUNK][at % Self::CHUNK]);
            }
        }
    }

    /// Whether two contents are the same bytes.
    pub(super) fn are_alike(&self, one: Content, other: Content) -> bool {
        let mut bytes = [[0; SECTOR]; 2];
        self.copy(one, &mut bytes[0]);
        self.copy(other, &mut bytes[1]);
        bytes[0] == bytes[1]
    }
}

/// Versions of a sector that a power cut may leave.
#[derive(Clone, Debug)]
pub(super) struct Volatile {
    pub(super) sector: usize,
    pub(super) durable: Content,
    /// Later versions with the number of their write's completion, oldest first.
    pub(super) later: SmallVec<[(u64, Content); 2]>,
}

/// A disk's cache: the sectors that are not at rest.
#[derive(Clone, Debug)]
pub(super) struct Cache {
    /// By sector: its place in the list plus one, or 0.
    places: Vec<u32>,
    list: Vec<Volatile>,
}

impl Cache {
    pub(super) fn new(sectors: usize) -> Cache {
        Cache { places: vec![0; sectors], list: Vec::new() }
    }

    /// Of so many sectors; those that go are at rest.
    pub(super) fn resize(&mut self, sectors: usize) {
        self.places.resize(sectors, 0);
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// In the order in which they left their rest.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Volatile> {
        self.list.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Volatile> {
        self.list.iter_mut()
    }

    pub(super) fn contains(&self, sector: usize) -> bool {
        self.places[sector] != 0
    }

    pub(super) fn is_at_rest(&self, sectors: Range<usize>) -> bool {
        self.places[sectors].iter().all(|place| *place == 0)
    }

    /// The sector's versions, with `durable` as the first of them if it was at rest.
    pub(super) fn versions(&mut self, sector: usize, durable: Content) -> &mut Volatile {
        if self.places[sector] == 0 {
            self.list.push(Volatile { sector, durable, later: SmallVec::new() });
            self.places[sector] = u32::try_from(self.list.len()).expect("small disks");
        }
        &mut self.list[self.places[sector] as usize - 1]
    }

    /// Keep those of which `stays` says so; the others are at rest from now on.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(&mut Volatile) -> bool) {
        let (places, mut kept) = (&mut self.places, 0);
        self.list.retain_mut(|volatile| {
            let stay = stays(volatile);
            kept += u32::from(stay);
            places[volatile.sector] = if stay { kept } else { 0 };
            stay
        });
    }

    /// All of them; every sector is at rest then.
    pub(super) fn take(&mut self) -> Vec<Volatile> {
        let list = std::mem::take(&mut self.list);
        list.iter().for_each(|volatile| self.places[volatile.sector] = 0);
        list
    }
}
