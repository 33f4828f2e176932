//! A system call that the kernel refuses, for the program under test.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// A classic BPF program that answers one system call with an error and lets all others through.
struct Filter([libc::sock_filter; 4]);

/// Let the kernel answer `syscall` with `errno` in what `command` starts.
pub(crate) fn deny(command: &mut Command, syscall: libc::c_long, errno: i32) {
    let filter = Filter::new(syscall, errno);
    // SAFETY: between fork and exec only system calls are made, on memory that was made before.
    unsafe { command.pre_exec(move || filter.install()) };
}

impl Filter {
    fn new(syscall: libc::c_long, errno: i32) -> Filter {
        let operation = |code: u32, jump_if_not: u8, k: u32| libc::sock_filter {
            code: u16::try_from(code).expect("operation codes are small"),
            jt: 0,
            jf: jump_if_not,
            k,
        };
        let number = u32::try_from(syscall).expect("system calls have small numbers");
        let refused = libc::SECCOMP_RET_ERRNO | u32::try_from(errno).expect("error numbers are positive");
        Filter([
            // The number is the first field of `seccomp_data`.
            operation(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            operation(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, number),
            operation(libc::BPF_RET | libc::BPF_K, 0, refused),
            operation(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ])
    }

    /// Set it for this thread and all that it becomes.
    fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog { len: 4, filter: self.0.as_ptr().cast_mut() };
        // SAFETY: the first call passes numbers; the second a program that lives until it returns, which the
        // kernel copies and does not write to.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
