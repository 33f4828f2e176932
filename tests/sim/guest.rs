//! Guest memory and the data in it: every sector says which write of which sector it is.

use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use vhost_remap::device::buffer::Iovecs;

use crate::rng::Rng;

pub(crate) const SECTOR: usize = 512;

/// What a sector holds: 0 is zeros, anything else the number of the write it came from.
pub(crate) type Value = u32;

fn word(sector: u64, value: Value, index: u64) -> u64 {
    let key = (sector << 32 | u64::from(value)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    key.rotate_left(29) ^ index.wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// The content of `sector` after write number `value`.
pub(crate) fn content(sector: u64, value: Value) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if value == 0 {
        return bytes;
    }
    for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        let index = index as u64;
        let word = if index == 0 { sector << 32 | u64::from(value) } else { word(sector, value, index) };
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// Which write `bytes` is of, if it is whole and belongs to `sector`.
pub(crate) fn value_of(sector: u64, bytes: &[u8]) -> Result<Value, String> {
    let first = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let value = u32::try_from(first & 0xffff_ffff).expect("masked");
    if bytes == content(sector, value) {
        return Ok(value);
    }
    let from = first >> 32;
    if bytes == content(from, value) {
        return Err(format!("the content of sector {from}, write {value}"));
    }
    Err(format!("no sector content at all: {:02x?}...", &bytes[..16]))
}

/// `len` bytes of guest memory in one to four pieces.
pub(crate) fn memory(len: usize, rng: &mut Rng) -> Iovecs {
    let bytes: Arc<Vec<AtomicU8>> = Arc::new((0..len).map(|_| AtomicU8::new(0xa5)).collect());
    let mut list = Iovecs::new();
    let mut from = 0;
    for left in (0..rng.index(4)).rev() {
        let to = if left == 0 { len } else { from + rng.index(len - from + 1) };
        push(&mut list, &bytes, from, to);
        from = to;
    }
    push(&mut list, &bytes, from, len);
    list.set_owner(bytes);
    list
}

fn push(list: &mut Iovecs, bytes: &[AtomicU8], from: usize, to: usize) {
    let ptr = bytes[from..to].as_ptr().cast::<u8>().cast_mut();
    // SAFETY: the caller hands the vector to the list as its owner; it is made of atomics, so that no
    // reference to it claims that its bytes do not change.
    unsafe { list.push(ptr, to - from) };
}
