//! What a device's error number means (E1).

use crate::device::Errno;

/// What an error number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// The medium failed.
    Medium,
    /// The medium or the device: the probe decides.
    Ambiguous,
    /// The device is gone.
    Gone,
    /// No space left; only this write fails.
    Space,
    /// The target does not do this; a probe decides for writes.
    Target,
    /// Our doing, or a shortage of the host's: try again.
    Ours,
    /// Anything else: the request fails, nothing is remapped.
    Unlisted,
}

impl Class {
    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Class::Medium => "medium",
            Class::Ambiguous => "io",
            Class::Gone => "gone",
            Class::Space => "space",
            Class::Target => "unsupported",
            Class::Ours => "host",
            Class::Unlisted => "other",
        }
    }
}

/// The class of an error number.
pub(super) fn class_of(errno: Errno) -> Class {
    match errno.0 {
        libc::ENODATA | libc::EILSEQ => Class::Medium,
        libc::EIO => Class::Ambiguous,
        libc::ENODEV | libc::ENXIO | libc::ENOTCONN | libc::ESTALE | libc::ENOLINK | libc::EROFS | libc::ETIMEDOUT => {
            Class::Gone
        }
        // What was under way to a FUSE server when it died; whatever comes after it gets ENOTCONN.
        libc::ECONNABORTED => Class::Gone,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Class::Space,
        libc::EREMOTEIO | libc::EOPNOTSUPP => Class::Target,
        libc::EINVAL | libc::EFAULT | libc::EAGAIN | libc::ENOMEM | libc::ECANCELED => Class::Ours,
        _ => Class::Unlisted,
    }
}
