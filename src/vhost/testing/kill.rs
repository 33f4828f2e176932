//! Processes that are killed in the middle of what they do: before any access to rings and in-flight regions.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

thread_local! {
    /// Accesses that are left to the process of this thread; none where it is not to be killed.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The panic of a process that is killed.
struct Killed;

/// Here a process may be killed.
pub(crate) fn point() {
    match LEFT.get() {
        None => {}
        Some(0) => resume_unwind(Box::new(Killed)),
        Some(left) => LEFT.set(Some(left - 1)),
    }
}

/// Have a process make so many accesses; whether it came to its end.
pub(crate) fn after(accesses: u32, process: impl FnOnce()) -> bool {
    LEFT.set(Some(accesses));
    let result = catch_unwind(AssertUnwindSafe(process));
    LEFT.set(None);
    match result {
        Ok(()) => true,
        Err(panic) if panic.is::<Killed>() => false,
        Err(panic) => resume_unwind(panic),
    }
}
