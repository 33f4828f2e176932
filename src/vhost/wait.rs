//! Waiting for a socket, or the end.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Wait until `fd` is readable; false if it is `shutdown` that is.
pub(super) fn wait_for(fd: BorrowedFd<'_>, shutdown: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(wait_until(fd, PollFlags::IN, shutdown, None)? == Some(true))
}

/// Wait until `fd` is as wanted; false if it is `shutdown` that is readable, `None` if neither is in time.
pub(super) fn wait_until(
    fd: BorrowedFd<'_>,
    wanted: PollFlags,
    shutdown: BorrowedFd<'_>,
    limit: Option<Duration>,
) -> io::Result<Option<bool>> {
    let mut fds = [PollFd::from_borrowed_fd(fd, wanted), PollFd::from_borrowed_fd(shutdown, PollFlags::IN)];
    Ok(poll(&mut fds, limit)?.then(|| fds[1].revents().is_empty()))
}

/// Wait until something is to be said of one of the descriptors; false if nothing is in time. A signal is no reason.
pub(super) fn poll(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<bool> {
    let limit = limit.map(|limit| Timespec::try_from(limit).expect("some seconds"));
    loop {
        match rustix::event::poll(fds, limit.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether accepting a front-end may succeed later.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::ECONNABORTED | libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
