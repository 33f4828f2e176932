//! Eventfds that front-ends hand over.

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

/// Whether a worker can sleep on a kick: an eventfd, which is what the protocol speaks of, or a pipe. A file is
/// readable at any time, and what cannot be polled would end the worker.
///
/// # Errors
/// When it cannot be waited for.
pub(super) fn check_kick(fd: &OwnedFd) -> Result<(), Errno> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)
}

/// The same eventfd for somebody else.
pub(super) fn duplicate(fd: Option<&OwnedFd>) -> Option<OwnedFd> {
    fd.and_then(|fd| fd.try_clone().inspect_err(|error| log::error!("an eventfd is lost: {error}")).ok())
}

/// What came with a message.
pub(super) fn event_fd(file: Option<File>) -> Option<OwnedFd> {
    file.map(OwnedFd::from)
}
