//! The virtio-blk configuration space (virtio 1.3 §5.2.4).

use std::sync::Arc;

use crate::runtime::worker::DiskInfo;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::units::BLOCK_SIZE;

/// Bytes of `struct virtio_blk_config` up to and with the zoned part.
const CONFIG_SIZE: usize = 96;

/// Offset of the `writeback` byte, the only one a driver may write (virtio 1.3 §5.2.5.1).
const WRITEBACK: u32 = 32;

/// Data segments of a request: a queue of 128 entries, the usual size, less header and status. It must not
/// depend on the queue size, which a migration may change under a running guest.
pub const SEG_MAX: u32 = 126;

/// Bytes of a segment. Together with [`SEG_MAX`] it stays well below
/// [`CHAIN_BYTES_MAX`](super::chain::CHAIN_BYTES_MAX).
pub const SIZE_MAX: u32 = 1 << 20;

/// Sectors of a discard segment (1 GiB): short enough to be cut into pieces that make nobody wait.
pub const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Segments of a discard.
pub const DISCARD_SEG_MAX: u32 = 32;
/// Sectors of a zeroing segment (128 MiB): a device without zeroing writes them all.
pub const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 18;
/// Segments of a zeroing.
pub const WRITE_ZEROES_SEG_MAX: u32 = 4;

const _: () = assert!((SEG_MAX as u64) * (SIZE_MAX as u64) < super::chain::CHAIN_BYTES_MAX);

/// A configuration access that the device does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the driver wrote {len} bytes at offset {offset} of the configuration: only the writeback byte may be written")]
pub struct NotWritable {
    /// Where.
    pub offset: u32,
    /// How much.
    pub len: usize,
}

/// The configuration space of one disk.
#[derive(Debug)]
pub struct Config {
    /// The capacity, which may change, aside.
    bytes: [u8; CONFIG_SIZE],
    capacity: Arc<AtomicU64>,
    writeback: AtomicBool,
}

impl Config {
    /// The configuration of `disk` with that many queues. The cache starts in write-back mode.
    pub fn new(disk: &DiskInfo, queues: u16) -> Config {
        let mut bytes = [0; CONFIG_SIZE];
        let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        let remap_unit = u32::try_from(BLOCK_SIZE).expect("a constant") / disk.logical_block_size;
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &disk.logical_block_size.to_le_bytes());
        // Topology: one physical block is one remap unit; smaller writes to a remapped block merge.
        put(24, &[u8::try_from(remap_unit.trailing_zeros()).expect("at most 31"), 0]);
        put(26, &u16::try_from(remap_unit).unwrap_or(0).to_le_bytes());
        put(34, &queues.to_le_bytes());
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &DISCARD_SEG_MAX.to_le_bytes());
        let sectors_per_unit = u32::try_from(crate::units::SECTORS_PER_BLOCK).expect("a constant");
        put(44, &sectors_per_unit.to_le_bytes());
        put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &WRITE_ZEROES_SEG_MAX.to_le_bytes());
        put(56, &[1]);
        Config { bytes, capacity: disk.capacity.clone(), writeback: AtomicBool::new(true) }
    }

    /// Exactly `len` bytes from `offset`, zeros beyond the end: front-ends ask for 57, 60 or 256 bytes and give
    /// up on any other answer.
    pub fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        // Read once: half of one capacity and half of another would be a third.
        let capacity = self.capacity.load(Ordering::SeqCst).to_le_bytes();
        let byte = |at: u64| {
            if at == u64::from(WRITEBACK) {
                return u8::from(self.is_writeback());
            }
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            capacity.get(at).or(self.bytes.get(at)).copied().unwrap_or(0)
        };
        (0..u64::from(len)).map(|i| byte(u64::from(offset) + i)).collect()
    }

    /// The driver writes.
    ///
    /// # Errors
    /// When it is not just the writeback byte, with 0 or 1.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), NotWritable> {
        match (offset, bytes) {
            (WRITEBACK, &[value @ 0..=1]) => {
                self.set_writeback(value == 1);
                Ok(())
            }
            _ => Err(NotWritable { offset, len: bytes.len() }),
        }
    }

    /// Whether the guest wants a volatile cache.
    pub fn is_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Switch between write-back and write-through.
    pub fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let capacity = Arc::new(AtomicU64::new(0x1122_3344));
        let disk = DiskInfo { capacity, logical_block_size: 512, read_only: false, serial: [0; 20] };
        Config::new(&disk, 64)
    }

    #[test]
    fn reads_have_exactly_the_length_asked_for() {
        let config = config();
        for len in [1, 57, 60, 256, 4096] {
            assert_eq!(config.read(0, len).len(), usize::try_from(len).unwrap());
        }
        assert_eq!(config.read(0, 8), 0x1122_3344_u64.to_le_bytes());
        assert_eq!(config.read(1, 2), [0x33, 0x22]);
        assert_eq!(config.read(95, 3), [0; 3]);
        assert_eq!(config.read(0x100, 60), [0; 60]);
        assert_eq!(config.read(u32::MAX, 4), [0; 4]);
    }

    #[test]
    fn a_disk_that_has_grown_shows_its_new_capacity() {
        let config = config();
        config.capacity.store(1 << 40, Ordering::SeqCst);
        assert_eq!(config.read(0, 9), [0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(config.read(5, 1), [1]);
    }

    #[test]
    fn fields_are_where_the_spec_has_them() {
        let bytes = config().read(0, 60);
        let le32 = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((le32(8), le32(12)), (SIZE_MAX, SEG_MAX));
        assert_eq!(le32(20), 512);
        assert_eq!(bytes[24..28], [3, 0, 8, 0]);
        assert_eq!(bytes[32], 1);
        assert_eq!(bytes[34..36], [64, 0]);
        assert_eq!((le32(36), le32(40), le32(44)), (DISCARD_SECTORS_MAX, DISCARD_SEG_MAX, 8));
        assert_eq!((le32(48), le32(52), bytes[56]), (WRITE_ZEROES_SECTORS_MAX, WRITE_ZEROES_SEG_MAX, 1));
    }

    #[test]
    fn only_the_writeback_byte_can_be_written() {
        let config = config();
        assert_eq!(config.write(32, &[0]), Ok(()));
        assert!(!config.is_writeback());
        assert_eq!(config.read(32, 1), [0]);
        assert!(config.write(32, &[2]).is_err());
        assert!(config.write(32, &[1, 0]).is_err());
        assert!(config.write(0, &[1]).is_err());
        assert!(config.write(32, &[]).is_err());
        assert!(!config.is_writeback());
    }
}
