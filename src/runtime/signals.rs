//! The signals the program takes: a request to stop, as a descriptor, and a file size limit, as an errno.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use vmm_sys_util::signal::{block_signal, create_sigset};

/// Let a write beyond RLIMIT_FSIZE fail with EFBIG instead of ending the process.
pub fn ignore_file_size_limit() {
    // SAFETY: SIG_IGN runs no code of ours and no memory is passed.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// A descriptor that is readable once SIGTERM or SIGINT came. To be called before the first thread
/// starts: the signals are blocked in this thread and those it starts, so that only the descriptor sees them.
///
/// # Errors
/// When the signals cannot be blocked or no descriptor is left.
pub fn stop_signals() -> io::Result<OwnedFd> {
    readable_at(&[libc::SIGTERM, libc::SIGINT])
}

/// As [`stop_signals`], for all that ends a program by default: who has changed the terminal has to change it back.
///
/// # Errors
/// As there.
pub fn end_signals() -> io::Result<OwnedFd> {
    readable_at(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT])
}

fn readable_at(stops: &[libc::c_int]) -> io::Result<OwnedFd> {
    for &signal in stops {
        block_signal(signal).map_err(|e| io::Error::other(format!("blocking signal {signal}: {e:?}")))?;
    }
    let set = create_sigset(stops).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // SAFETY: `set` is a live sigset_t for the length of the call; the kernel copies it.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd just returned this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn a_request_to_stop_can_be_polled_for() {
        // On a thread of its own: its signal mask goes with it.
        let test = std::thread::spawn(|| {
            let stop = stop_signals().unwrap();
            let readable = || {
                let mut fds = [PollFd::new(&stop, PollFlags::IN)];
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap()
            };
            assert_eq!(readable(), 0);
            // SAFETY: no memory is passed; the signal goes to this thread, which has just blocked it.
            unsafe { libc::raise(libc::SIGTERM) };
            assert_eq!(readable(), 1);
        });
        test.join().unwrap();
    }
}
