//! Linux error numbers and their names.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A Linux error number, as a device returned it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

/// The numbers that storage devices, file systems and this crate speak of.
const NAMES: &[(i32, &str)] = &[
    (libc::EPERM, "EPERM"),
    (libc::ENOENT, "ENOENT"),
    (libc::EINTR, "EINTR"),
    (libc::EIO, "EIO"),
    (libc::ENXIO, "ENXIO"),
    (libc::EBADF, "EBADF"),
    (libc::EAGAIN, "EAGAIN"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::EACCES, "EACCES"),
    (libc::EFAULT, "EFAULT"),
    (libc::EBUSY, "EBUSY"),
    (libc::EEXIST, "EEXIST"),
    (libc::ENODEV, "ENODEV"),
    (libc::EINVAL, "EINVAL"),
    (libc::EFBIG, "EFBIG"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::EROFS, "EROFS"),
    (libc::ENOSYS, "ENOSYS"),
    (libc::ENODATA, "ENODATA"),
    (libc::ETIME, "ETIME"),
    (libc::ENOLINK, "ENOLINK"),
    (libc::ECOMM, "ECOMM"),
    (libc::EPROTO, "EPROTO"),
    (libc::EBADMSG, "EBADMSG"),
    (libc::EOVERFLOW, "EOVERFLOW"),
    (libc::EILSEQ, "EILSEQ"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::ENOTCONN, "ENOTCONN"),
    (libc::ESHUTDOWN, "ESHUTDOWN"),
    (libc::ETIMEDOUT, "ETIMEDOUT"),
    (libc::ECONNABORTED, "ECONNABORTED"),
    (libc::ECONNRESET, "ECONNRESET"),
    (libc::ESTALE, "ESTALE"),
    (libc::EUCLEAN, "EUCLEAN"),
    (libc::EREMOTEIO, "EREMOTEIO"),
    (libc::EDQUOT, "EDQUOT"),
    (libc::ENOMEDIUM, "ENOMEDIUM"),
    (libc::ECANCELED, "ECANCELED"),
];

impl Errno {
    /// The symbolic name, where this crate knows it.
    pub fn name(self) -> Option<&'static str> {
        NAMES.iter().find(|(number, _)| *number == self.0).map(|(_, name)| *name)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

/// Not the name of an error number.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an error: use a name such as EIO, ENODATA or ETIMEDOUT, or a number from 1 to 4095")]
pub struct UnknownErrno(pub String);

impl FromStr for Errno {
    type Err = UnknownErrno;

    fn from_str(text: &str) -> Result<Errno, UnknownErrno> {
        let upper = text.to_ascii_uppercase();
        if let Some((number, _)) = NAMES.iter().find(|(_, name)| *name == upper) {
            return Ok(Errno(*number));
        }
        match text.parse::<i32>() {
            // The kernel's MAX_ERRNO.
            Ok(number @ 1..=4095) => Ok(Errno(number)),
            _ => Err(UnknownErrno(text.to_owned())),
        }
    }
}

impl Serialize for Errno {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.name() {
            Some(name) => serializer.serialize_str(name),
            None => serializer.serialize_str(&self.0.to_string()),
        }
    }
}

impl<'de> Deserialize<'de> for Errno {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Errno, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_go_both_ways() {
        for (number, name) in NAMES {
            assert_eq!(name.parse(), Ok(Errno(*number)));
            assert_eq!(Errno(*number).name(), Some(*name));
        }
        assert_eq!("eio".parse(), Ok(Errno(libc::EIO)));
        assert_eq!("121".parse(), Ok(Errno(libc::EREMOTEIO)));
        assert!("EWHAT".parse::<Errno>().unwrap_err().to_string().contains("\"EWHAT\" is not an error"));
        assert!("0".parse::<Errno>().is_err());
    }

    #[test]
    fn json_uses_the_name() {
        assert_eq!(serde_json::to_string(&Errno(libc::EIO)).unwrap(), "\"EIO\"");
        assert_eq!(serde_json::from_str::<Errno>("\"ENODATA\"").unwrap(), Errno(libc::ENODATA));
    }
}
