//! Virtio-blk requests (virtio 1.3 §5.2.6): from a chain to an engine request, or to an answer
//! that needs no disk.
//!
//! No framing is assumed (virtio 1.3 §2.7.4): the header is the first 16 readable bytes and the status the
//! last writable byte, wherever descriptors end.

use super::chain::{CHAIN_BYTES_MAX, Chain};
use super::config::{DISCARD_SECTORS_MAX, DISCARD_SEG_MAX, WRITE_ZEROES_SECTORS_MAX, WRITE_ZEROES_SEG_MAX};
use crate::device::buffer::Iovecs;
use crate::engine::request::RequestOp;
use crate::engine::view::Reserve;
use crate::runtime::worker::DiskInfo;
use crate::units::{SECTOR_SIZE, Sector, SectorRange};

/// Status bytes.
pub const S_OK: u8 = 0;
/// The device or driver failed.
pub const S_IOERR: u8 = 1;
/// The device does not know the request.
pub const S_UNSUPP: u8 = 2;

/// Request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_GET_LIFETIME: u32 = 10;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Bytes of the header: type, reserved, sector.
const HEADER_SIZE: u64 = 16;
/// Bytes of a discard or zeroing segment: sector, sectors, flags.
const SEGMENT_SIZE: u64 = 16;
/// The segment flag that allows to release space.
const SEGMENT_UNMAP: u32 = 1;

/// How much of the blocks in reserve is used: not known, less than 80 %, 80 % or more, 90 % or more.
const PRE_EOL_UNDEFINED: u8 = 0;
const PRE_EOL_NORMAL: u8 = 1;
const PRE_EOL_WARNING: u8 = 2;
const PRE_EOL_URGENT: u8 = 3;

/// Most iovecs the kernel takes in one call (UIO_MAXIOV). The driver knows the far smaller `seg_max`.
const IOVECS_MAX: usize = 1024;

/// What a chain asks for.
#[derive(Debug)]
pub enum Parsed {
    /// A request for the engine; when it ends well, `written` bytes were written, the status included.
    Submit {
        /// The request.
        op: RequestOp,
        /// The used length of success.
        written: u32,
    },
    /// The answer is OK already.
    Done {
        /// The used length.
        written: u32,
    },
    /// It cannot be served; the used length is that of the status byte.
    Refused(Refused),
}

/// A request that is answered before it comes to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The status byte.
    pub status: u8,
    /// For people.
    pub cause: &'static str,
}

impl Refused {
    fn io_err(cause: &'static str) -> Refused {
        Refused { status: S_IOERR, cause }
    }

    fn unsupported(cause: &'static str) -> Refused {
        Refused { status: S_UNSUPP, cause }
    }
}

/// Understand a chain that has a status byte. `pool` has empty lists to use again.
pub fn parse(chain: &Chain<'_>, disk: &DiskInfo, reserve: &Reserve, pool: &mut Vec<Iovecs>) -> Parsed {
    let mut header = [0_u8; 16];
    if chain.is_faulty() || !chain.read_at(0, &mut header) {
        return Parsed::Refused(Refused::io_err("its buffers are not all in guest memory, or hold no header"));
    }
    let header = u128::from_le_bytes(header);
    let kind = u32::try_from(header & 0xffff_ffff).expect("masked");
    let sector = Sector(u64::try_from(header >> 64).expect("sixty-four bits are left"));
    let parsed = match kind {
        T_IN => read(chain, sector, pool),
        T_OUT | T_DISCARD | T_WRITE_ZEROES if disk.read_only => Err(Refused::io_err("the disk is read-only")),
        T_OUT => write(chain, sector, pool),
        // UEFI firmware flushes read-only disks too and takes an error for a broken disk.
        T_FLUSH if disk.read_only => Ok(Parsed::Done { written: 1 }),
        T_FLUSH => Ok(Parsed::Submit { op: RequestOp::Flush, written: 1 }),
        // The identity is padded with zeros and not terminated.
        T_GET_ID => Ok(inform(chain, &disk.serial)),
        T_GET_LIFETIME => Ok(inform(chain, &lifetime(reserve))),
        T_DISCARD => discard(chain),
        T_WRITE_ZEROES => write_zeroes(chain),
        _ => Err(Refused::unsupported("its type is unknown")),
    };
    parsed.unwrap_or_else(Parsed::Refused)
}

fn read(chain: &Chain<'_>, sector: Sector, pool: &mut Vec<Iovecs>) -> Result<Parsed, Refused> {
    let len = chain.writable_len() - 1;
    let range = sectors(sector, len, chain)?;
    let mut data = pool.pop().unwrap_or_default();
    chain.writable_into(len, &mut data);
    let written = u32::try_from(len + 1).map_err(|_| Refused::io_err("it is too long"))?;
    Ok(Parsed::Submit { op: RequestOp::Read { range, data }, written })
}

fn write(chain: &Chain<'_>, sector: Sector, pool: &mut Vec<Iovecs>) -> Result<Parsed, Refused> {
    let len = chain.readable_len() - HEADER_SIZE;
    let range = sectors(sector, len, chain)?;
    let mut data = pool.pop().unwrap_or_default();
    chain.readable_into(HEADER_SIZE, len, &mut data);
    Ok(Parsed::Submit { op: RequestOp::Write { range, data }, written: 1 })
}

/// The sectors of a transfer of `len` bytes.
fn sectors(start: Sector, len: u64, chain: &Chain<'_>) -> Result<SectorRange, Refused> {
    let range = SectorRange { start, count: len / SECTOR_SIZE };
    let whole = len.is_multiple_of(SECTOR_SIZE) && len <= CHAIN_BYTES_MAX;
    if !whole || !is_addressable(range) || chain.pieces() > IOVECS_MAX {
        return Err(Refused::io_err("it is not in whole sectors, too long, or beyond any disk"));
    }
    Ok(range)
}

/// Whether the range has a byte address; whether it is on the disk is for the engine to say.
fn is_addressable(range: SectorRange) -> bool {
    range.checked_end().is_some_and(|end| end.0.checked_mul(SECTOR_SIZE).is_some())
}

/// Answer with a few bytes; a buffer of another length gets what fits.
fn inform(chain: &Chain<'_>, bytes: &[u8]) -> Parsed {
    let copied = chain.write_data(bytes);
    Parsed::Done { written: 1 + u32::try_from(copied).expect("at most twenty") }
}

/// `struct virtio_blk_lifetime` (virtio 1.3 §5.2.6): `pre_eol_info`, and the wear of two kinds of flash cells, of
/// which nothing is known (0).
fn lifetime(reserve: &Reserve) -> [u8; 6] {
    let pre_eol_info = match reserve.used_percent() {
        None => PRE_EOL_UNDEFINED,
        Some(0..80) => PRE_EOL_NORMAL,
        Some(80..90) => PRE_EOL_WARNING,
        Some(90..) => PRE_EOL_URGENT,
    };
    [pre_eol_info, 0, 0, 0, 0, 0]
}

fn discard(chain: &Chain<'_>) -> Result<Parsed, Refused> {
    let segments = segments(chain, DISCARD_SEG_MAX, DISCARD_SECTORS_MAX, 0)?;
    let ranges: Vec<_> = segments.into_iter().map(|(range, _)| range).collect();
    Ok(submit_or_done(ranges.is_empty(), RequestOp::Discard { ranges }))
}

fn write_zeroes(chain: &Chain<'_>) -> Result<Parsed, Refused> {
    let ranges = segments(chain, WRITE_ZEROES_SEG_MAX, WRITE_ZEROES_SECTORS_MAX, SEGMENT_UNMAP)?;
    Ok(submit_or_done(ranges.is_empty(), RequestOp::WriteZeroes { ranges }))
}

fn submit_or_done(nothing: bool, op: RequestOp) -> Parsed {
    if nothing { Parsed::Done { written: 1 } } else { Parsed::Submit { op, written: 1 } }
}

/// The segments of a discard or zeroing that have any sector, with their unmap flag. A flag outside of
/// `flags` is answered with UNSUPP; so is the unmap flag of a discard (virtio 1.3 §5.2.6.2).
fn segments(
    chain: &Chain<'_>,
    segments_max: u32,
    sectors_max: u32,
    flags: u32,
) -> Result<Vec<(SectorRange, bool)>, Refused> {
    let len = chain.readable_len() - HEADER_SIZE;
    let count = len / SEGMENT_SIZE;
    if len == 0 || !len.is_multiple_of(SEGMENT_SIZE) || count > u64::from(segments_max) {
        return Err(Refused::io_err("it has no whole segments, or too many"));
    }
    let mut found = Vec::new();
    let mut impossible = false;
    for i in 0..count {
        let mut bytes = [0_u8; 16];
        if !chain.read_at(HEADER_SIZE + i * SEGMENT_SIZE, &mut bytes) {
            return Err(Refused::io_err("its segments are not in guest memory"));
        }
        let word = u128::from_le_bytes(bytes);
        let start = Sector(u64::try_from(word & u128::from(u64::MAX)).expect("masked"));
        let sectors = u32::try_from((word >> 64) & 0xffff_ffff).expect("masked");
        let segment_flags = u32::try_from(word >> 96).expect("thirty-two bits are left");
        if segment_flags & !flags != 0 {
            return Err(Refused::unsupported("a segment has a flag that is unknown"));
        }
        let range = SectorRange { start, count: u64::from(sectors) };
        if sectors > sectors_max || !is_addressable(range) {
            // Looked at to the end: an unknown flag in a later segment has precedence.
            impossible = true;
        } else if sectors > 0 {
            found.push((range, segment_flags & SEGMENT_UNMAP != 0));
        }
    }
    if impossible {
        return Err(Refused::io_err("a segment is too long, or beyond any disk"));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::sync::atomic::AtomicU64;
    use crate::vhost::chain::Scatter;
    use crate::vhost::testing::{Buffer, DATA, Guest, chain_of, readable, writable};

    const STATUS: u64 = DATA + 0x8000;
    const BODY: u64 = DATA + 0x1000;

    fn disk(read_only: bool) -> DiskInfo {
        DiskInfo {
            capacity: Arc::new(AtomicU64::new(1 << 20)),
            logical_block_size: 512,
            read_only,
            serial: *b"serial-number-of-20b",
        }
    }

    /// What a request of that type with these data buffers comes to, in short.
    fn check_on(disk: &DiskInfo, guest: &Guest, kind: u32, sector: u64, data: &[Buffer]) -> String {
        check_with(disk, &Reserve::default(), guest, kind, sector, data)
    }

    fn check_with(
        disk: &DiskInfo,
        reserve: &Reserve,
        guest: &Guest,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> String {
        guest.write(DATA, &kind.to_le_bytes());
        guest.write(DATA + 8, &sector.to_le_bytes());
        let mut buffers = vec![readable(DATA, 16)];
        buffers.extend_from_slice(data);
        buffers.push(writable(STATUS, 1));
        let head = chain_of(guest, &buffers);
        let (mut scatter, map, ring) = (Scatter::default(), guest.map(), guest.ring());
        let chain = scatter.walk(&ring, &map, head).unwrap();
        match parse(&chain, disk, reserve, &mut Vec::new()) {
            Parsed::Done { written } => format!("status 0, {written}"),
            Parsed::Refused(refused) => format!("status {}, 1", refused.status),
            Parsed::Submit { op, written } => format!("{op:?}, {written}"),
        }
    }

    fn check(kind: u32, sector: u64, data: &[Buffer], expected: &str) {
        assert_eq!(check_on(&disk(false), &Guest::new(16), kind, sector, data), expected);
    }

    #[test]
    fn reads_and_writes() {
        let range = "SectorRange { start: Sector(7), count: 2 }";
        let transfer = |name| format!("{name} {{ range: {range}, data: Iovecs(1024 bytes in 2) }}");
        let halves = |buffer: fn(u64, u32) -> Buffer| [buffer(BODY, 1000), buffer(BODY + 4096, 24)];
        check(T_IN, 7, &halves(writable), &format!("{}, 1025", transfer("Read")));
        check(T_OUT, 7, &halves(readable), &format!("{}, 1", transfer("Write")));
    }

    #[test]
    fn transfers_that_are_not_whole_sectors_fail() {
        check(T_IN, 0, &[writable(BODY, 511)], "status 1, 1");
        check(T_OUT, 0, &[readable(BODY, 513)], "status 1, 1");
        check(T_IN, u64::MAX, &[writable(BODY, 512)], "status 1, 1");
        check(T_OUT, u64::MAX / 512, &[readable(BODY, 512)], "status 1, 1");
    }

    #[test]
    fn the_identity_fills_what_fits() {
        let guest = Guest::new(16);
        for (len, written) in [(20, 21), (8, 9), (64, 21)] {
            assert_eq!(
                check_on(&disk(false), &guest, T_GET_ID, 0, &[writable(BODY, len)]),
                format!("status 0, {written}")
            );
        }
        assert_eq!(&guest.read::<20>(BODY), b"serial-number-of-20b");
        check(T_GET_ID, 0, &[], "status 0, 1");
    }

    #[test]
    fn the_lifetime_follows_the_use_of_the_reserve_and_fills_what_fits() {
        let guest = Guest::new(16);
        let reserve = Reserve::default();
        let check = |read_only, len, expected: &str| {
            guest.write(BODY, &[0xee; 8]);
            let data = [writable(BODY, len)];
            assert_eq!(check_with(&disk(read_only), &reserve, &guest, T_GET_LIFETIME, 0, &data), expected);
            guest.read::<8>(BODY)
        };
        assert_eq!(check(false, 6, "status 0, 7"), [0, 0, 0, 0, 0, 0, 0xee, 0xee]);
        for (percent, pre_eol_info) in [(0, 1), (79, 1), (80, 2), (89, 2), (90, 3), (100, 3)] {
            reserve.set_used(Some(percent));
            assert_eq!(check(percent % 2 == 0, 6, "status 0, 7"), [pre_eol_info, 0, 0, 0, 0, 0, 0xee, 0xee]);
        }
        assert_eq!(check(false, 1, "status 0, 2")[..2], [3, 0xee]);
        assert_eq!(check(false, 64, "status 0, 7"), [3, 0, 0, 0, 0, 0, 0xee, 0xee]);
        reserve.set_used(None);
        assert_eq!(check(false, 2, "status 0, 3")[..2], [0, 0]);
        check(false, 0, "status 0, 1");
    }

    #[test]
    fn unknown_types_are_unsupported() {
        for kind in [2, 3, 5, 9, 12, 14, 15, u32::MAX] {
            check(kind, 0, &[], "status 2, 1");
        }
    }

    #[test]
    fn a_read_only_disk_takes_reads_and_flushes() {
        let guest = Guest::new(16);
        let check = |kind, data: &[Buffer]| check_on(&disk(true), &guest, kind, 0, data);
        assert!(check(T_IN, &[writable(BODY, 512)]).starts_with("Read"));
        assert_eq!(check(T_FLUSH, &[]), "status 0, 1");
        for kind in [T_OUT, T_DISCARD, T_WRITE_ZEROES] {
            assert_eq!(check(kind, &[readable(BODY, 512)]), "status 1, 1");
        }
    }

    fn segments_of(guest: &Guest, segments: &[(u64, u32, u32)]) -> [Buffer; 2] {
        for (i, (sector, sectors, flags)) in segments.iter().enumerate() {
            let at = BODY + 16 * i as u64;
            guest.write(at, &sector.to_le_bytes());
            guest.write(at + 8, &sectors.to_le_bytes());
            guest.write(at + 12, &flags.to_le_bytes());
        }
        // Cut in the middle of a segment: there is no framing.
        let len = u32::try_from(segments.len() * 16).unwrap();
        [readable(BODY, 5), readable(BODY + 5, len - 5)]
    }

    fn check_segments(kind: u32, segments: &[(u64, u32, u32)], expected: &str) {
        let guest = Guest::new(16);
        let buffers = segments_of(&guest, segments);
        assert_eq!(check_on(&disk(false), &guest, kind, 0, &buffers), expected, "{segments:?}");
    }

    #[test]
    fn discards_and_zeroings_have_segments() {
        let a = "SectorRange { start: Sector(8), count: 16 }";
        let b = "SectorRange { start: Sector(64), count: 1 }";
        let three = [(8, 16, 0), (9, 0, 0), (64, 1, 0)];
        check_segments(T_DISCARD, &three, &format!("Discard {{ ranges: [{a}, {b}] }}, 1"));
        let flagged = [(8, 16, 1), (64, 1, 0)];
        let expected = format!("WriteZeroes {{ ranges: [({a}, true), ({b}, false)] }}, 1");
        check_segments(T_WRITE_ZEROES, &flagged, &expected);
        check_segments(T_DISCARD, &[(8, 0, 0)], "status 0, 1");
    }

    #[test]
    fn bad_segments_are_refused() {
        check_segments(T_DISCARD, &[(8, 8, 1)], "status 2, 1");
        check_segments(T_WRITE_ZEROES, &[(8, 8, 2)], "status 2, 1");
        check_segments(T_WRITE_ZEROES, &[(8, u32::MAX, 0), (8, 8, 4)], "status 2, 1");
        check_segments(T_DISCARD, &[(8, DISCARD_SECTORS_MAX + 1, 0)], "status 1, 1");
        check_segments(T_WRITE_ZEROES, &[(8, WRITE_ZEROES_SECTORS_MAX + 1, 0)], "status 1, 1");
        check_segments(T_DISCARD, &[(u64::MAX, 8, 0)], "status 1, 1");
        let most = usize::try_from(WRITE_ZEROES_SEG_MAX).unwrap();
        check_segments(T_WRITE_ZEROES, &vec![(0, 0, 0); most], "status 0, 1");
        check_segments(T_WRITE_ZEROES, &vec![(0, 0, 0); most + 1], "status 1, 1");
        check(T_DISCARD, 0, &[], "status 1, 1");
        check(T_DISCARD, 0, &[readable(BODY, 24)], "status 1, 1");
    }

    #[test]
    fn a_header_that_is_too_short_fails() {
        let guest = Guest::new(16);
        let head = chain_of(&guest, &[readable(DATA, 15), writable(STATUS, 1)]);
        let (mut scatter, map, ring) = (Scatter::default(), guest.map(), guest.ring());
        let chain = scatter.walk(&ring, &map, head).unwrap();
        let parsed = parse(&chain, &disk(false), &Reserve::default(), &mut Vec::new());
        assert!(matches!(parsed, Parsed::Refused(Refused { status: S_IOERR, .. })), "{parsed:?}");
    }
}
