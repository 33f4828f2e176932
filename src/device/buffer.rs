//! Memory for I/O: scatter lists that point into guest memory, and aligned buffers of our own.
//!
//! [`Iovecs`] is the safe face of foreign memory: whoever makes one promises (once, in an `unsafe`
//! constructor) that the memory lives as long as the owner it hands over; everything after that is
//! bounds-checked copying. Guest memory may change under us at any time, so it is only ever copied
//! through raw pointers, never borrowed as a slice.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of [`AlignedBuf`]: enough for O_DIRECT on every device with pages or sectors of 4 KiB.
pub const ALIGNMENT: usize = 4096;

/// Keeps the memory behind an [`Iovecs`] mapped.
pub type MemoryOwner = Arc<dyn Any + Send + Sync>;

/// A borrowed list of iovecs: plain data that an operation carries.
///
/// Making or copying one is safe; using it is what [`super::Device::submit`] is unsafe for.
#[derive(Clone, Copy)]
pub struct IoSlice {
    ptr: *const libc::iovec,
    count: usize,
}

// SAFETY: an IoSlice is an address and a count; every dereference is behind an unsafe contract that
// speaks of the memory itself.
unsafe impl Send for IoSlice {}

impl IoSlice {
    /// No memory at all, for flushes and the like.
    pub const EMPTY: IoSlice = IoSlice { ptr: std::ptr::null(), count: 0 };

    /// Address of the first iovec.
    pub fn as_ptr(self) -> *const libc::iovec {
        self.ptr
    }

    /// Number of iovecs.
    pub fn count(self) -> usize {
        self.count
    }

    /// The iovecs.
    ///
    /// # Safety
    /// The list behind this slice is still alive and unmoved.
    pub unsafe fn iovecs<'a>(self) -> &'a [libc::iovec] {
        if self.count == 0 {
            return &[];
        }
        // SAFETY: the caller promises that `ptr` still points to `count` iovecs.
        unsafe { std::slice::from_raw_parts(self.ptr, self.count) }
    }
}

impl fmt::Debug for IoSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoSlice({} iovecs)", self.count)
    }
}

/// A scatter list with the owner of its memory.
#[derive(Default)]
pub struct Iovecs {
    list: Vec<libc::iovec>,
    len: usize,
    owner: Option<MemoryOwner>,
}

// SAFETY: the iovecs are addresses of memory kept alive by `owner`, which is Send and Sync itself;
// access goes through raw copies that tolerate concurrent change.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// An empty list, to be filled with [`Iovecs::push`].
    pub fn new() -> Iovecs {
        Iovecs::default()
    }

    /// Empty the list and let go of the memory's owner, keeping the list's allocation.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
        self.owner = None;
    }

    /// Say who keeps the memory of this list alive.
    pub fn set_owner(&mut self, owner: MemoryOwner) {
        self.owner = Some(owner);
    }

    /// Append `len` bytes at `ptr`. Empty pieces are dropped.
    ///
    /// # Safety
    /// The memory is valid for reads and writes for as long as the owner given to
    /// [`Iovecs::set_owner`] lives, and nobody holds a Rust reference into it.
    pub unsafe fn push(&mut self, ptr: *mut u8, len: usize) {
        if len > 0 {
            self.list.push(libc::iovec { iov_base: ptr.cast(), iov_len: len });
            self.len = self.len.checked_add(len).expect("the pieces of one address space fit in usize");
        }
    }

    /// `len` bytes of a shared buffer from `from` on, to be written to a device: nobody may read into it.
    ///
    /// # Panics
    /// If the range is not inside the buffer.
    pub fn of_buffer(buf: &Arc<AlignedBuf>, from: usize, len: usize) -> Iovecs {
        let ptr = buf[from..from + len].as_ptr().cast_mut();
        let list = vec![libc::iovec { iov_base: ptr.cast(), iov_len: len }];
        Iovecs { list, len, owner: Some(buf.clone()) }
    }

    /// Total bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address and length of each piece.
    pub fn pieces(&self) -> impl Iterator<Item = (*const u8, usize)> {
        self.list.iter().map(|piece| (piece.iov_base.cast_const().cast(), piece.iov_len))
    }

    /// The whole list as an operation's `data`.
    pub fn as_io(&self) -> IoSlice {
        IoSlice { ptr: self.list.as_ptr(), count: self.list.len() }
    }

    /// A list of its own for `len` bytes from `offset`, with the same owner.
    ///
    /// # Panics
    /// If the range is not inside the list.
    pub fn slice(&self, offset: usize, len: usize) -> Iovecs {
        let mut part = Iovecs { list: Vec::new(), len: 0, owner: self.owner.clone() };
        self.for_pieces(offset, len, |ptr, n| {
            part.list.push(libc::iovec { iov_base: ptr.cast(), iov_len: n });
            part.len += n;
        });
        part
    }

    /// Copy `to.len()` bytes from `offset` of this list.
    ///
    /// # Panics
    /// If the range is not inside the list.
    pub fn copy_to(&self, offset: usize, to: &mut [u8]) {
        let mut done = 0;
        self.for_pieces(offset, to.len(), |ptr, n| {
            // SAFETY: `ptr` is valid for `n` bytes (promise of `push`), `to` has `n` left (for_pieces
            // visits exactly to.len() bytes), and a local slice cannot overlap foreign memory.
            unsafe { std::ptr::copy_nonoverlapping(ptr, to[done..done + n].as_mut_ptr(), n) };
            done += n;
        });
    }

    /// Copy `from` into this list at `offset`.
    ///
    /// # Panics
    /// If the range is not inside the list.
    pub fn copy_from(&self, offset: usize, from: &[u8]) {
        let mut done = 0;
        self.for_pieces(offset, from.len(), |ptr, n| {
            // SAFETY: as in copy_to, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from[done..done + n].as_ptr(), ptr, n) };
            done += n;
        });
    }

    fn for_pieces(&self, mut offset: usize, mut len: usize, mut visit: impl FnMut(*mut u8, usize)) {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "a piece outside of the scatter list");
        for iovec in &self.list {
            if len == 0 {
                break;
            }
            if offset >= iovec.iov_len {
                offset -= iovec.iov_len;
                continue;
            }
            let n = len.min(iovec.iov_len - offset);
            visit(iovec.iov_base.cast::<u8>().wrapping_add(offset), n);
            offset = 0;
            len -= n;
        }
    }
}

impl fmt::Debug for Iovecs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iovecs({} bytes in {})", self.len, self.list.len())
    }
}

/// A zeroed, page-aligned buffer of ours.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
    /// From a box, but not one: a box that moves may take for granted that nobody else knows its address.
    iovec: NonNull<libc::iovec>,
}

// SAFETY: the buffer owns its memory alone.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes at an [`ALIGNMENT`]-aligned address.
    pub fn zeroed(len: usize) -> AlignedBuf {
        // SAFETY: the layout has a size of at least one byte.
        Self::of(unsafe { alloc_zeroed(Self::layout(len)) }, len)
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> AlignedBuf {
        // SAFETY: as in zeroed; all of the buffer is written before anybody sees it, to memory just allocated.
        unsafe {
            let ptr = alloc(Self::layout(bytes.len()));
            if !ptr.is_null() {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), ptr, bytes.len());
            }
            Self::of(ptr, bytes.len())
        }
    }

    /// The buffer of `len` initialised bytes at `ptr`, which was allocated with our layout; null ends the process.
    fn of(ptr: *mut u8, len: usize) -> AlignedBuf {
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(Self::layout(len)) };
        let iovec = Box::leak(Box::new(libc::iovec { iov_base: ptr.as_ptr().cast(), iov_len: len })).into();
        AlignedBuf { ptr, len, iovec }
    }

    /// The whole buffer as an operation's `data`. The iovec lives in the buffer and moves with
    /// neither the buffer nor its owner.
    pub fn as_io(&self) -> IoSlice {
        IoSlice { ptr: self.iovec.as_ptr(), count: usize::from(self.len > 0) }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len.max(1), ALIGNMENT).expect("buffer sizes are far below isize::MAX")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the buffer owns `len` initialised bytes at `ptr`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` or `copy_of` with this very layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) };
        // SAFETY: leaked in `of`, and not given away.
        drop(unsafe { Box::from_raw(self.iovec.as_ptr()) });
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests;
