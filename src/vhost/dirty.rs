//! The dirty log of a live migration: a bit in shared memory for each page of guest memory that the device wrote
//! (QEMU's `docs/interop/vhost-user.rst`, "Migration").
//!
//! A page is marked after it was written, when its request ends: the front-end clears a bit before it copies the
//! page, so whatever it misses it finds marked the next time round.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::fstat;

use super::memory::{Mapping, MemoryMap};

/// Bytes of guest memory for each bit (VHOST_LOG_PAGE).
const LOG_PAGE: u64 = 4096;
/// The virtio feature bit by which a front-end turns logging on (VHOST_F_LOG_ALL).
pub(super) const VHOST_F_LOG_ALL: u32 = 26;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    /// Sizes that do not add up.
    #[error("dirty log of {len:#x} bytes at {offset:#x}: {reason}")]
    Range {
        /// Bytes.
        len: u64,
        /// Start in its file.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The memory cannot be had.
    #[error("dirty log: {0}")]
    Io(#[from] io::Error),
}

/// The log, mapped.
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Start of the log in the mapping: offsets need not be aligned to pages.
    lead: usize,
    /// Bytes.
    len: usize,
}

impl DirtyLog {
    /// Map the log that the front-end handed over.
    ///
    /// # Errors
    /// When it is not all in its file, or cannot be mapped.
    pub fn map(file: &File, offset: u64, len: u64) -> Result<DirtyLog, DirtyLogError> {
        let refuse = |reason| DirtyLogError::Range { len, offset, reason };
        let file_len = u64::try_from(fstat(file).map_err(io::Error::from)?.st_size).unwrap_or(0);
        if len == 0 {
            return Err(refuse("it is empty"));
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            // The first access beyond the end would end this process with SIGBUS.
            return Err(refuse("it reaches beyond the end of its file"));
        }
        let lead = offset % LOG_PAGE;
        let whole = lead.checked_add(len).and_then(|len| usize::try_from(len).ok());
        let whole = whole.ok_or_else(|| refuse("it is too long"))?;
        let mapping = Mapping::new(file, offset - lead, whole).map_err(io::Error::from)?;
        let lead = usize::try_from(lead).expect("less than a page");
        Ok(DirtyLog { mapping, lead, len: whole - lead })
    }

    /// `len` bytes from guest address `guest` were written. What the log has no bits for is none of its business.
    pub fn mark(&self, guest: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| guest.checked_add(more)) else { return };
        for page in guest / LOG_PAGE..=last / LOG_PAGE {
            let Some(byte) = usize::try_from(page / 8).ok().filter(|byte| *byte < self.len) else { return };
            self.byte(byte).fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }

    /// `len` bytes of `memory` at the host address `ptr` were written.
    pub(super) fn mark_host(&self, memory: &MemoryMap, ptr: *const u8, len: usize) {
        memory.guest_ranges(ptr, len, |guest, len| self.mark(guest, len));
    }

    fn byte(&self, index: usize) -> &AtomicU8 {
        assert!(index < self.len);
        // SAFETY: the mapping has `lead + len` bytes, lives as long as `self`, and all access is atomic.
        unsafe { AtomicU8::from_ptr(self.mapping.start().wrapping_add(self.lead + index)) }
    }
}

/// A log, where there is one.
pub type MaybeLog = Option<Arc<DirtyLog>>;

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn file(len: u64) -> File {
        let memfd = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memfd, len).unwrap();
        File::from(memfd)
    }

    fn content(file: &File, len: usize) -> Vec<u8> {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn each_page_that_was_touched_has_its_bit() {
        let file = file(64);
        let log = DirtyLog::map(&file, 8, 4).unwrap();
        log.mark(4095, 2);
        log.mark(9 * 4096, 4096);
        log.mark(31 * 4096 + 5, 0);
        let mut expected = vec![0; 64];
        expected[8] = 0b11;
        expected[9] = 0b10;
        assert_eq!(content(&file, 64), expected);
        // The last bit is there, and nothing beyond it.
        log.mark(31 * 4096, 1 << 40);
        log.mark(u64::MAX - 1, 2);
        log.mark(u64::MAX - 1, 8);
        expected[11] = 0x80;
        assert_eq!(content(&file, 64), expected);
    }

    #[test]
    fn a_log_that_is_not_all_there_is_refused() {
        let file = file(4096);
        for (offset, len) in [(0, 0), (0, 4097), (4096, 1), (u64::MAX, 2)] {
            assert!(matches!(DirtyLog::map(&file, offset, len), Err(DirtyLogError::Range { .. })), "{offset} {len}");
        }
    }
}
