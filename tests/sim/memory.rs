//! Memory of runs: a thread keeps what it frees, by size, and takes it from there again. A run allocates thousands
//! of times, and the system's allocator, which serves everybody, took a fifth of the time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;

/// Sizes are powers of two up to this one; larger ones are the system's affair.
const LARGEST: usize = 1 << 17;
const SIZES: usize = LARGEST.ilog2() as usize + 1;
/// The coarsest alignment of what is kept: a page.
const ALIGN_MAX: usize = 4096;
/// Room for the address of the next one.
const SMALLEST: usize = size_of::<*mut u8>();

/// What a thread has freed, by the logarithm of its size: the first of a list that runs through the memory itself.
/// At the thread's end it is forgotten.
struct Kept([Cell<*mut u8>; SIZES]);

thread_local! {
    static KEPT: Kept = const { Kept([const { Cell::new(null_mut()) }; SIZES]) };
}

struct Recycling;

#[global_allocator]
static RECYCLING: Recycling = Recycling;

/// What stands for all layouts of about that size, if they are kept.
fn shared(layout: Layout) -> Option<Layout> {
    let size = layout.size().max(layout.align()).max(SMALLEST).next_power_of_two();
    (size <= LARGEST && layout.align() <= ALIGN_MAX)
        .then(|| Layout::from_size_align(size, size.min(ALIGN_MAX)).expect("two powers of two"))
}

fn kept<T>(size: usize, act: impl FnOnce(&Cell<*mut u8>) -> T) -> T {
    KEPT.with(|kept| act(&kept.0[size.ilog2() as usize]))
}

// SAFETY: memory is given out by one `alloc` at a time: it comes from the system, or from a list of the thread into
// which only `dealloc` puts what was given out with a layout of the same `shared` size and alignment, which are at
// least those asked for. The lists are not touched by anything else and need no allocation or destructor.
unsafe impl GlobalAlloc for Recycling {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(shared) = shared(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        };
        kept(shared.size(), |first| match first.get() {
            // SAFETY: its size is not 0.
            free if free.is_null() => unsafe { System.alloc(shared) },
            free => {
                // SAFETY: `dealloc` has written the address of the next one there.
                first.set(unsafe { free.cast::<*mut u8>().read() });
                free
            }
        })
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        let Some(shared) = shared(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.dealloc(ptr, layout) };
        };
        kept(shared.size(), |first| {
            // SAFETY: nobody else knows this memory any more, and it has room and alignment for an address.
            unsafe { ptr.cast::<*mut u8>().write(first.get()) };
            first.set(ptr);
        });
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let new = Layout::from_size_align(size, layout.align()).expect("the caller's promise");
        let (before, after) = (shared(layout), shared(new));
        if before.is_none() && after.is_none() {
            // SAFETY: the caller's promise.
            return unsafe { System.realloc(ptr, layout, size) };
        }
        if before == after {
            return ptr;
        }
        // SAFETY: the size is not 0, by the caller's promise.
        let moved = unsafe { self.alloc(new) };
        if !moved.is_null() {
            // SAFETY: two separate pieces of memory of at least so many bytes, the first given back once.
            unsafe {
                std::ptr::copy_nonoverlapping(ptr, moved, layout.size().min(size));
                self.dealloc(ptr, layout);
            }
        }
        moved
    }
}
