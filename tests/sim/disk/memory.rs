//! The memory of an operation.

use vhost_remap::device::Op;

/// An operation's memory from some byte on: the only place that follows its pointers. What goes through it is copied
/// sector by sector, for which the processor's nearest cache has room.
pub(super) struct Memory<'a> {
    op: &'a Op,
    pieces: &'a [libc::iovec],
    /// Bytes of the first of them that are behind us.
    done: usize,
}

impl Memory<'_> {
    pub(super) fn of(op: &Op) -> Memory<'_> {
        // SAFETY: the world performs an operation only between its submission and its completion, while
        // whoever submitted it keeps list and memory alive and unmoved (the contract of `Device::submit`).
        Memory { op, pieces: unsafe { op.data.iovecs() }, done: 0 }
    }

    /// Copy between the next of it and `bytes`.
    pub(super) fn copy(&mut self, mut bytes: &mut [u8], from_memory: bool) {
        while !bytes.is_empty() {
            let piece =
                self.pieces.first().unwrap_or_else(|| panic!("an operation has too little data: {:?}", self.op));
            let (part, rest) = bytes.split_at_mut(bytes.len().min(piece.iov_len - self.done));
            let memory = piece.iov_base.cast::<u8>().wrapping_add(self.done);
            // SAFETY: as above; so many bytes are left of the piece, and `part` is a local slice that cannot overlap
            // foreign memory.
            unsafe {
                if from_memory {
                    std::ptr::copy_nonoverlapping(memory, part.as_mut_ptr(), part.len());
                } else {
                    std::ptr::copy_nonoverlapping(part.as_ptr(), memory, part.len());
                }
            }
            self.done += part.len();
            if self.done == piece.iov_len {
                (self.pieces, self.done) = (&self.pieces[1..], 0);
            }
            bytes = rest;
        }
    }

    /// All of it was copied.
    pub(super) fn end(&self) {
        assert!(self.pieces.is_empty(), "an operation has too much data: {:?}", self.op);
    }
}
