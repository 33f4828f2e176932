//! The virtio-blk device as front-ends see it: features, configuration, identity.
//!
//! [`Server`](super::server::Server) serves it to front-ends, and so does
//! [`framework::Server`](super::framework::Server), on rust-vmm's daemon.

use std::sync::Arc;

use virtio_bindings::bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::QUEUES_MAX;
use super::config::{Config, NotWritable};
use crate::runtime::worker::DiskInfo;
use crate::sync::atomic::{AtomicBool, Ordering};

/// The vhost-user feature bit that announces protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
pub const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What was negotiated and configured, read by workers with every request.
#[derive(Debug)]
pub struct Settings {
    config: Config,
    flush: AtomicBool,
    /// The cache mode a driver has chosen. It outlives a reset: front-ends show the next driver what they remember.
    writeback: AtomicBool,
    /// Whether the driver knows of the cache mode what is known here. A front-end that comes back after the end of this
    /// process neither asks for the configuration nor says what its driver has chosen before.
    agreed: AtomicBool,
}

impl Settings {
    /// Whether writes must be durable before they are answered: the driver cannot flush, or has switched the
    /// cache to write-through (virtio 1.3 §5.2.5, §5.2.6.2), or may have.
    pub fn write_through(&self) -> bool {
        !(self.flush.load(Ordering::Relaxed) && self.agreed.load(Ordering::Relaxed) && self.config.is_writeback())
    }

    /// The driver flushes, which it would not if it took the cache for write-through.
    pub fn flushed(&self) {
        self.agreed.store(true, Ordering::Relaxed);
    }
}

/// One virtio-blk device.
pub struct BlkDevice {
    disk: Arc<DiskInfo>,
    queues: u16,
    settings: Arc<Settings>,
}

impl BlkDevice {
    /// The device that shows `disk` and offers `queues` queues, 1 to [`QUEUES_MAX`].
    pub fn new(disk: Arc<DiskInfo>, queues: u16) -> BlkDevice {
        let queues = queues.clamp(1, QUEUES_MAX);
        let settings = Settings {
            config: Config::new(&disk, queues),
            flush: AtomicBool::new(false),
            writeback: AtomicBool::new(true),
            agreed: AtomicBool::new(false),
        };
        BlkDevice { disk, queues, settings: Arc::new(settings) }
    }

    /// Queues on offer.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// What the disk is.
    pub fn disk(&self) -> &DiskInfo {
        &self.disk
    }

    /// What workers look at.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.clone()
    }

    /// Virtio feature bits on offer.
    pub fn offered_features(&self) -> u64 {
        let always = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VHOST_USER_F_PROTOCOL_FEATURES,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
        ];
        let writable = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let by_mode: &[u32] = if self.disk.read_only { &[VIRTIO_BLK_F_RO] } else { &writable };
        always.iter().chain(by_mode).fold(0, |features, number| features | bit(*number))
    }

    /// Note what the driver took. Without FLUSH a driver that can see the cache mode sees write-through
    /// (virtio 1.3 §5.2.5.2).
    pub fn negotiated(&self, features: u64) {
        let flush = features & bit(VIRTIO_BLK_F_FLUSH) != 0;
        self.settings.flush.store(flush, Ordering::Relaxed);
        let visible = features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        self.settings.config.set_writeback(self.settings.writeback.load(Ordering::Relaxed) && (flush || !visible));
    }

    /// Bytes of the configuration: exactly `len`.
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        if Config::has_writeback(offset, len) {
            self.settings.agreed.store(true, Ordering::Relaxed);
        }
        self.settings.config.read(offset, len)
    }

    /// Whether the driver wants a volatile cache.
    pub fn is_writeback(&self) -> bool {
        self.settings.config.is_writeback()
    }

    /// Switch between write-back and write-through, for the driver.
    pub fn set_writeback(&self, writeback: bool) {
        self.settings.config.set_writeback(writeback);
    }

    /// The driver writes to the configuration.
    ///
    /// # Errors
    /// When it is not the writeback byte.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), NotWritable> {
        self.settings.config.write(offset, bytes)?;
        self.settings.writeback.store(self.settings.config.is_writeback(), Ordering::Relaxed);
        self.settings.agreed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Back to the state before any driver, but for the cache mode.
    pub fn reset(&self) {
        self.settings.flush.store(false, Ordering::Relaxed);
        self.settings.config.set_writeback(self.settings.writeback.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::Bench;

    #[test]
    fn a_read_only_disk_offers_no_writes() {
        let mut disk = Bench::ports(1).0.disk().clone();
        let has = |disk: &DiskInfo, number| {
            BlkDevice::new(Arc::new(disk.clone()), QUEUES_MAX).offered_features() & bit(number) != 0
        };
        assert!(!has(&disk, VIRTIO_BLK_F_RO) && has(&disk, VIRTIO_BLK_F_DISCARD));
        disk.read_only = true;
        assert!(has(&disk, VIRTIO_BLK_F_RO) && has(&disk, VIRTIO_BLK_F_FLUSH));
        assert!(!has(&disk, VIRTIO_BLK_F_DISCARD) && !has(&disk, VIRTIO_BLK_F_WRITE_ZEROES));
    }

    #[test]
    fn without_flush_the_cache_shows_as_write_through() {
        let (device, _) = Bench::ports(1);
        device.negotiated(device.offered_features() & !bit(VIRTIO_BLK_F_FLUSH));
        assert_eq!(device.read_config(32, 1), [0]);
        assert!(device.settings().write_through());
        device.reset();
        assert_eq!(device.read_config(32, 1), [1]);
    }

    #[test]
    fn the_cache_is_write_through_until_the_driver_is_known_to_flush() {
        let agreements: [fn(&BlkDevice); 3] = [
            |device| device.settings().flushed(),
            |device| drop(device.read_config(0, 60)),
            |device| device.write_config(32, &[1]).unwrap(),
        ];
        for agree in agreements {
            let (device, _) = Bench::ports(1);
            device.negotiated(device.offered_features());
            drop(device.read_config(0, 32));
            drop(device.read_config(33, 60));
            assert!(device.settings().write_through(), "a driver may have chosen that in the life before this one");
            agree(&device);
            assert!(!device.settings().write_through());
        }
    }

    #[test]
    fn what_the_driver_chose_outlives_a_reset() {
        let (device, _) = Bench::ports(1);
        device.write_config(32, &[0]).unwrap();
        device.reset();
        device.negotiated(device.offered_features());
        assert_eq!(device.read_config(32, 1), [0]);
        assert!(device.settings().write_through());
    }
}
