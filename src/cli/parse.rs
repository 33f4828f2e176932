//! Values as people type them.

use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::units::{SECTOR_SIZE, Sector, SectorRange};

/// Suffixes and the powers of two they stand for.
const SUFFIXES: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// Bytes in the answer to GET_ID (virtio 1.3 §5.2.6).
const SERIAL_MAX: usize = 20;

/// The slowest that the scanner can be told to read, in bytes of a second.
const RATE_MIN: u64 = 64 << 10;

/// A size in bytes: `10G`, `512M`, `1T`, `4096`. A multiple of 512, not zero.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let bytes = number_of_bytes(text)?;
    if bytes == 0 {
        return Err("a disk cannot have size 0".into());
    }
    if bytes % SECTOR_SIZE != 0 {
        let (down, up) = (bytes - bytes % SECTOR_SIZE, bytes.next_multiple_of(SECTOR_SIZE));
        let next = if down == 0 { format!("one is {up}") } else { format!("ones are {down} and {up}") };
        return Err(format!("{bytes} bytes is not a multiple of {SECTOR_SIZE}; the next {next}"));
    }
    Ok(bytes)
}

/// Bytes of a second, written as a size: at least 64K.
pub(super) fn rate(text: &str) -> Result<u64, String> {
    let bytes = number_of_bytes(text)?;
    if bytes < RATE_MIN { Err(format!("{text:?} of a second is less than 64K, the least")) } else { Ok(bytes) }
}

fn number_of_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write it like 10G, 512M, 1T or in bytes");
    let upper = text.to_ascii_uppercase();
    if upper.len() > 2 && upper.ends_with('B') && !upper.ends_with("IB") {
        return Err(format!("{text:?} is ambiguous; write G or GiB, M or MiB (powers of 1024), or bytes"));
    }
    let stem = upper.strip_suffix("IB").unwrap_or(&upper);
    let (number, shift) = match SUFFIXES.iter().find_map(|(suffix, shift)| Some((stem.strip_suffix(*suffix)?, *shift)))
    {
        Some(found) => found,
        None if stem.len() == upper.len() => (stem, 0),
        None => return Err(wrong()),
    };
    if number.is_empty() || !number.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let too_large = || format!("{text:?} is too large; the most is 8191P");
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(too_large)?;
    if bytes > i64::MAX.cast_unsigned() {
        return Err(too_large());
    }
    Ok(bytes)
}

/// A whole number, both ends included.
pub(super) fn number<T>(least: T, most: T) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Copy + Send + Sync + 'static,
{
    move |text| {
        let number = text.parse().ok().filter(|number| (least..=most).contains(number));
        number.ok_or_else(|| format!("a whole number from {least} to {most} is needed"))
    }
}

/// Sectors: `17`, or `8-15` with both ends included.
pub(super) fn sectors(text: &str) -> Result<SectorRange, String> {
    let wrong = || format!("{text:?} is no sector or range of sectors; write it like 17 or 8-15 (both included)");
    let number = |digits: &str| match digits.bytes().all(|b| b.is_ascii_digit()) {
        true => digits.parse::<u64>().map_err(|_| wrong()),
        false => Err(wrong()),
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    if last < first {
        return Err(format!("{text:?} ends before it starts"));
    }
    let count = (last - first).checked_add(1).ok_or_else(wrong)?;
    let range = SectorRange { start: Sector(first), count };
    range.checked_end().map(|_| range).ok_or_else(wrong)
}

/// A disk serial number: 1 to 20 printable ASCII characters.
pub(super) fn serial(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > SERIAL_MAX {
        return Err(format!("a serial has 1 to {SERIAL_MAX} bytes, this one {}", text.len()));
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a serial has only printable ASCII characters and no spaces".into());
    }
    Ok(text.into())
}

/// The spare of `primary` where none was given: `PRIMARY.spare` beside a regular file.
pub(super) fn default_spare(primary: &Path) -> Result<PathBuf, String> {
    if std::fs::metadata(primary).is_ok_and(|meta| meta.file_type().is_block_device()) {
        return Err(format!("{}: is a block device: say where its spare is with --spare", primary.display()));
    }
    Ok(with_suffix(primary, ".spare"))
}

/// `path` with `suffix` appended to its last component.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// How often: `1s`, `500ms`, or a number of seconds.
pub(super) fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs);
    let found = seconds.ok().or_else(|| humantime::parse_duration(text).ok());
    let found = found.filter(|found| (Duration::from_millis(100)..=Duration::from_secs(3600)).contains(found));
    found.ok_or_else(|| format!("{text:?} is no time from 100ms to 1h; write it like 500ms, 2s or 1m"))
}

/// `9100`, `127.0.0.1:9100` or `[::1]:9100`.
pub(super) fn http_listen(text: &str) -> Result<SocketAddr, String> {
    let at_port = text.parse::<u16>().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    at_port
        .or_else(|_| text.parse())
        .map_err(|_| format!("{text:?} is neither a port (9100) nor an address with one (127.0.0.1:9100, [::1]:9100)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_in_powers_of_1024() {
        let check = |text, bytes| assert_eq!(size(text), Ok(bytes), "{text}");
        check("512", 512);
        check("10G", 10 << 30);
        check("512m", 512 << 20);
        check("1T", 1 << 40);
        check("1TiB", 1 << 40);
        check("3k", 3 << 10);
        check("8191P", 8191 << 50);
    }

    #[test]
    fn sizes_that_cannot_be_meant_are_refused_with_the_reason() {
        let check = |text, reason: &str| {
            let error = size(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        };
        for text in ["", "G", "ten", "1.5G", "-1", "+1G", "1GG", "5iB", "10 G"] {
            check(text, "is no size");
        }
        check("10GB", "ambiguous");
        check("0", "size 0");
        check("1000", "the next ones are 512 and 1024");
        check("8192P", "too large");
        check("99999999999999999999", "too large");
    }

    #[test]
    fn a_rate_is_a_size_of_64_kib_or_more() {
        assert_eq!((rate("50M"), rate("64K"), rate("65537")), (Ok(50 << 20), Ok(65_536), Ok(65_537)));
        assert!(rate("63K").unwrap_err().contains("64K") && rate("0").is_err() && rate("fast").is_err());
    }

    #[test]
    fn numbers_have_two_ends() {
        let parse = number(16_u32, 4_194_304);
        assert_eq!((parse("16"), parse("4194304")), (Ok(16), Ok(4_194_304)));
        let refused = || Err("a whole number from 16 to 4194304 is needed".to_owned());
        for text in ["", "15", "4194305", "5000000000", "-16", "1e5", "0x20", "sixteen"] {
            assert_eq!(parse(text), refused(), "{text}");
        }
    }

    #[test]
    fn sector_ranges_include_both_ends() {
        let range = |start, count| Ok(SectorRange { start: Sector(start), count });
        assert_eq!(sectors("17"), range(17, 1));
        assert_eq!(sectors("8-15"), range(8, 8));
        for text in ["", "-", "8-", "-8", "15-8", "a-b", "1-2-3", "+1", "0-18446744073709551615"] {
            assert!(sectors(text).is_err(), "{text}");
        }
    }

    #[test]
    fn serials_fit_the_guests_answer() {
        assert_eq!(serial("disk-7").as_deref(), Ok("disk-7"));
        assert!(serial("").is_err() && serial(&"x".repeat(21)).is_err() && serial("a b").is_err());
    }

    #[test]
    fn the_spare_of_a_file_lies_beside_it() {
        assert_eq!(default_spare(Path::new("/no/such/disk.img")), Ok("/no/such/disk.img.spare".into()));
    }
}
