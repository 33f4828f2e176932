//! Guest memory and the data in it: every sector says which write of which sector it is.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vhost_remap::device::buffer::Iovecs;

use crate::rng::Rng;

pub(crate) const SECTOR: usize = 512;

/// What a sector holds: 0 is zeros, anything else the number of the write it came from.
pub(crate) type Value = u32;

/// The word that a sector consists of after write number `value`.
pub(crate) fn word(sector: u64, value: Value) -> u64 {
    if value == 0 { 0 } else { sector << 32 | u64::from(value) }
}

/// Fill `bytes` with one word again and again.
pub(crate) fn fill_with(bytes: &mut [u8], word: u64) {
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
}

/// The word that all of `bytes` consists of, if there is one.
pub(crate) fn uniform(bytes: &[u8]) -> Option<u64> {
    let first: [u8; 8] = bytes[..8].try_into().expect("eight bytes");
    (bytes[8..] == bytes[..bytes.len() - 8]).then_some(u64::from_le_bytes(first))
}

/// Which write `bytes` is of, if it is whole and belongs to `sector`.
pub(crate) fn value_of(sector: u64, bytes: &[u8]) -> Result<Value, String> {
    let Some(found) = uniform(bytes) else {
        return Err(format!("no sector content at all: {:02x?}...", &bytes[..16]));
    };
    let value = u32::try_from(found & 0xffff_ffff).expect("masked");
    if found == word(sector, value) {
        return Ok(value);
    }
    Err(format!("the content of sector {}, write {value}", found >> 32))
}

thread_local! {
    /// Memory of requests that have ended.
    static POOL: RefCell<Vec<Vec<AtomicU64>>> = const { RefCell::new(Vec::new()) };
}

/// Memory of a request, which goes back to the pool with it.
struct Pooled(Vec<AtomicU64>);

impl Drop for Pooled {
    fn drop(&mut self) {
        // The thread may be ending, and with it the pool.
        let _ = POOL.try_with(|pool| pool.borrow_mut().push(std::mem::take(&mut self.0)));
    }
}

/// Guest memory in one to four pieces: sector by sector, the word that each is full of.
pub(crate) fn memory(sectors: impl ExactSizeIterator<Item = u64>, rng: &mut Rng) -> Iovecs {
    let len = sectors.len() * SECTOR;
    let mut bytes = POOL.with(|pool| pool.borrow_mut().pop()).unwrap_or_default();
    if bytes.len() < len / 8 {
        bytes.resize_with(len / 8, AtomicU64::default);
    }
    for (sector, word) in bytes.chunks_exact_mut(SECTOR / 8).zip(sectors) {
        sector.iter_mut().for_each(|place| *place.get_mut() = word.to_le());
    }
    let bytes = Arc::new(Pooled(bytes));
    let mut list = Iovecs::new();
    let mut from = 0;
    for left in (0..rng.index(4)).rev() {
        let to = if left == 0 { len } else { from + rng.index(len - from + 1) };
        push(&mut list, &bytes.0, from, to);
        from = to;
    }
    push(&mut list, &bytes.0, from, len);
    list.set_owner(bytes);
    list
}

fn push(list: &mut Iovecs, bytes: &[AtomicU64], from: usize, to: usize) {
    assert!(from <= to && to <= size_of_val(bytes));
    let ptr = bytes.as_ptr().cast::<u8>().cast_mut().wrapping_add(from);
    // SAFETY: so many bytes are there, and the caller hands the vector to the list as its owner; it is made of atomics,
    // so that no reference to it claims that its bytes do not change.
    unsafe { list.push(ptr, to - from) };
}
