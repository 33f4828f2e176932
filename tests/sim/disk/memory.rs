//! The memory of operations and requests.

use std::fmt::Debug;

use vhost_remap::device::Op;
use vhost_remap::device::buffer::Iovecs;

use crate::guest::SECTOR;

/// The memory of an operation or of a request from some byte on: the only place that follows pointers.
pub(crate) struct Memory<'a> {
    whose: &'a dyn Debug,
    pieces: &'a [libc::iovec],
    /// Bytes of the first of them that are behind us.
    done: usize,
}

impl Memory<'_> {
    pub(super) fn of(op: &Op) -> Memory<'_> {
        // SAFETY: the world performs an operation only between its submission and its completion, while
        // whoever submitted it keeps list and memory alive and unmoved (the contract of `Device::submit`).
        Memory { whose: op, pieces: unsafe { op.data.iovecs() }, done: 0 }
    }

    pub(crate) fn of_request(data: &Iovecs) -> Memory<'_> {
        // SAFETY: the list is borrowed for as long, and owns the memory.
        Memory { whose: data, pieces: unsafe { data.as_io().iovecs() }, done: 0 }
    }

    /// The next sector of it, if that lies in one piece. Nobody else may use it meanwhile.
    fn sector(&mut self) -> Option<*mut [u8; SECTOR]> {
        let piece = self.pieces.first().filter(|piece| piece.iov_len - self.done >= SECTOR)?;
        let sector = piece.iov_base.cast::<u8>().wrapping_add(self.done).cast();
        self.done += SECTOR;
        self.leave_piece(piece.iov_len);
        Some(sector)
    }

    /// What the next sector of it holds.
    pub(crate) fn read<T>(&mut self, look: impl FnOnce(&[u8; SECTOR]) -> T) -> T {
        match self.sector() {
            // SAFETY: as in `of`; a simulation is one thread, which does not write to it before `look` is back.
            Some(sector) => look(unsafe { &*sector }),
            None => {
                let mut bytes = [0; SECTOR];
                self.copy(&mut bytes, true);
                look(&bytes)
            }
        }
    }

    /// Change the next sector of it.
    pub(super) fn write(&mut self, put: impl FnOnce(&mut [u8; SECTOR])) {
        match self.sector() {
            // SAFETY: as in `read`.
            Some(sector) => put(unsafe { &mut *sector }),
            None => {
                let mut bytes = [0; SECTOR];
                put(&mut bytes);
                self.copy(&mut bytes, false);
            }
        }
    }

    fn leave_piece(&mut self, len: usize) {
        if self.done == len {
            (self.pieces, self.done) = (&self.pieces[1..], 0);
        }
    }

    /// Copy between the next of it and `bytes`.
    fn copy(&mut self, mut bytes: &mut [u8], from_memory: bool) {
        while !bytes.is_empty() {
            let piece = self.pieces.first().unwrap_or_else(|| panic!("there is too little data: {:?}", self.whose));
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
            self.leave_piece(piece.iov_len);
            bytes = rest;
        }
    }

    /// All of it was copied.
    pub(crate) fn end(&self) {
        assert!(self.pieces.is_empty(), "there is too much data: {:?}", self.whose);
    }
}
