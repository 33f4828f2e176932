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
use super::channel::Channel;
use super::config::{Config, NotWritable};
use crate::runtime::worker::DiskInfo;
use crate::sync::atomic::{AtomicBool, Ordering};

/// The vhost-user feature bit that announces protocol features (VHOST_USER_F_PROTOCOL_FEATURES).
pub const VHOST_USER_F_PROTOCOL_FEATURES: u32 = 30;

/// GET_LIFETIME is answered (virtio 1.3 §5.2.3). Linux has no name for it.
const VIRTIO_BLK_F_LIFETIME: u32 = 15;

const fn bit(number: u32) -> u64 {
    1 << number
}

/// What was negotiated and configured, read by workers with every request.
#[derive(Debug)]
pub struct Settings {
    config: Config,
    flush: AtomicBool,
    /// The cache mode that a driver has chosen. It outlives a reset, as front-ends show the next driver what they
    /// remember; a driver that is shown write-through does not flush.
    writeback: AtomicBool,
}

impl Settings {
    /// Whether writes must be durable before they are answered: the driver cannot flush, or has switched the
    /// cache to write-through (virtio 1.3 §5.2.5, §5.2.6.2).
    pub fn write_through(&self) -> bool {
        !(self.flush.load(Ordering::Relaxed) && self.config.is_writeback())
    }
}

/// One virtio-blk device.
pub struct BlkDevice {
    /// Where to tell the front-end of changes.
    channel: Channel,
    disk: Arc<DiskInfo>,
    queues: u16,
    settings: Arc<Settings>,
}

impl BlkDevice {
    /// The device that shows `disk` and offers `queues` queues, 1 to [`QUEUES_MAX`].
    pub fn new(disk: Arc<DiskInfo>, queues: u16) -> BlkDevice {
        let queues = queues.clamp(1, QUEUES_MAX);
        let (flush, writeback) = (AtomicBool::new(false), AtomicBool::new(true));
        let settings = Arc::new(Settings { config: Config::new(&disk, queues), flush, writeback });
        BlkDevice { channel: Channel::new(), disk, queues, settings }
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

    /// Tell the front-end that the disk has another size.
    pub fn announce(&self) {
        self.channel.announce();
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
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
            VIRTIO_BLK_F_LIFETIME,
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
        self.settings.config.set_writeback(self.is_writeback() && (flush || !visible));
    }

    /// Bytes of the configuration: exactly `len`.
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        self.settings.config.read(offset, len)
    }

    /// Whether the driver wants a volatile cache.
    pub fn is_writeback(&self) -> bool {
        self.settings.writeback.load(Ordering::Relaxed)
    }

    /// Switch between write-back and write-through, for the driver.
    pub fn set_writeback(&self, writeback: bool) {
        self.settings.writeback.store(writeback, Ordering::Relaxed);
        self.settings.config.set_writeback(writeback);
    }

    /// The driver writes to the configuration.
    ///
    /// # Errors
    /// When it is not the writeback byte.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), NotWritable> {
        self.settings.config.write(offset, bytes)?;
        self.settings.writeback.store(self.settings.config.is_writeback(), Ordering::Relaxed);
        Ok(())
    }

    /// Back to the state before any driver, but for the cache mode.
    pub fn reset(&self) {
        self.settings.flush.store(false, Ordering::Relaxed);
        self.settings.config.set_writeback(self.is_writeback());
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
    fn what_the_driver_chose_outlives_a_reset() {
        let (device, _) = Bench::ports(1);
        device.write_config(32, &[0]).unwrap();
        device.reset();
        device.negotiated(device.offered_features());
        assert_eq!(device.read_config(32, 1), [0]);
        assert!(device.settings().write_through());
    }
}
