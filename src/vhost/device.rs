//! The virtio-blk device as front-ends see it: features, configuration, identity.
//!
//! [`BlkDevice`] also implements [`VhostUserBackend`], so that rust-vmm's own daemon can serve a volume with
//! this crate's parser and ring. The product uses [`Server`](super::server::Server) instead: the daemon
//! tracks no requests in flight and does not wait for them when memory goes away.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
        VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::config::{Config, NotWritable};
use super::memory::{MemoryMap, RegionBits};
use super::ring::RingAddresses;
use super::status::WorkerStatus;
use super::worker::{DataPlane, QueueKick, StartQueue, StopHow};
use super::{QUEUE_SIZE_MAX, QUEUES_MAX};
use crate::runtime::worker::{DiskInfo, WorkerPort};

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
    disk: Arc<DiskInfo>,
    queues: u16,
    settings: Arc<Settings>,
    /// Workers for the threads of rust-vmm's daemon, by thread.
    ports: Mutex<Vec<Option<WorkerPort>>>,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
}

thread_local! {
    /// The worker of a daemon's thread; a daemon has its threads for itself.
    static PLANE: RefCell<Option<DataPlane>> = const { RefCell::new(None) };
}

impl BlkDevice {
    /// The device that shows `disk` and offers `queues` queues, 1 to [`QUEUES_MAX`].
    pub fn new(disk: Arc<DiskInfo>, queues: u16) -> BlkDevice {
        let queues = queues.clamp(1, QUEUES_MAX);
        let settings = Arc::new(Settings { config: Config::new(&disk, queues), flush: AtomicBool::new(false) });
        BlkDevice { disk, queues, settings, ports: Mutex::new(Vec::new()), memory: Mutex::new(None) }
    }

    /// The device, to be run by `VhostUserDaemon` with one of `ports` for each of its threads.
    pub fn for_daemon(disk: Arc<DiskInfo>, ports: Vec<WorkerPort>) -> BlkDevice {
        let device = BlkDevice::new(disk, QUEUES_MAX);
        *device.ports.lock().unwrap_or_else(PoisonError::into_inner) = ports.into_iter().map(Some).collect();
        device
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
        if !flush && features & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            self.settings.config.set_writeback(false);
        }
    }

    /// Bytes of the configuration: exactly `len`.
    pub fn read_config(&self, offset: u32, len: u32) -> Vec<u8> {
        self.settings.config.read(offset, len)
    }

    /// The driver writes to the configuration.
    ///
    /// # Errors
    /// When it is not the writeback byte.
    pub fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), NotWritable> {
        self.settings.config.write(offset, bytes)
    }

    /// Back to the state before any driver.
    pub fn reset(&self) {
        self.settings.flush.store(false, Ordering::Relaxed);
        self.settings.config.set_writeback(true);
    }

    /// Serve what a vring of rust-vmm's daemon holds now, to the end.
    fn serve_vring(&self, index: u16, vring: &VringRwLock, plane: &mut DataPlane) {
        let Some(memory) = self.memory.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
        let map = MemoryMap::of_guest_memory(&memory.memory().into_inner());
        let mut state = vring.get_mut();
        let queue = state.get_queue_mut();
        if !queue.ready() {
            return;
        }
        let addresses =
            RingAddresses { descriptors: queue.desc_table(), avail: queue.avail_ring(), used: queue.used_ring() };
        let start = StartQueue {
            index,
            addresses,
            size: queue.size(),
            next_avail: queue.next_avail(),
            event_idx: queue.event_idx_enabled(),
            inflight: None,
            kick: QueueKick::Caller,
            call: None,
            err: None,
            enabled: true,
        };
        let (done, _) = std::sync::mpsc::channel();
        plane.set_memory(&map, RegionBits::default(), done);
        plane.start(start);
        plane.turn(false);
        while !plane.is_quiet(index) {
            plane.turn(plane.in_flight() > 0);
        }
        let (reply, stopped) = std::sync::mpsc::channel();
        plane.stop(index, StopHow::Drain, reply);
        plane.turn(false);
        if let Ok(next_avail) = stopped.try_recv() {
            queue.set_next_avail(next_avail);
            // Nothing is under way, so everything taken has been used.
            queue.set_next_used(next_avail);
        }
        if let Err(error) = state.signal_used_queue() {
            log::warn!("queue {index}: the guest cannot be notified: {error}");
        }
    }

    fn plane_for(&self, thread: usize) -> io::Result<Option<DataPlane>> {
        let port = self.ports.lock().unwrap_or_else(PoisonError::into_inner).get_mut(thread).and_then(Option::take);
        let open =
            |port: WorkerPort| Ok(DataPlane::new(port.open()?, self.settings.clone(), Arc::new(WorkerStatus::new())));
        port.map(open).transpose()
    }
}

impl VhostUserBackend for BlkDevice {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(self.queues)
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        self.offered_features()
    }

    fn acked_features(&self, features: u64) {
        self.negotiated(features);
    }

    /// What the daemon can do; [`Server`](super::server::Server) offers more.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each vring's queue knows; `serve_vring` asks it.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.read_config(offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        self.write_config(offset, buf).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![u64::MAX]
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the daemon never ends.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[VringRwLock],
        thread_id: usize,
    ) -> io::Result<()> {
        // An error would end the daemon's thread without a word, so none leaves this function.
        let Some(vring) = vrings.get(usize::from(device_event)) else { return Ok(()) };
        PLANE.with_borrow_mut(|plane| {
            if plane.is_none() {
                match self.plane_for(thread_id) {
                    Ok(new) => *plane = new,
                    Err(error) => log::error!("no worker for thread {thread_id}: {error}"),
                }
            }
            if let Some(plane) = plane {
                self.serve_vring(device_event, vring, plane);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::{Bench, DATA, Guest, chain_from, readable, writable};

    #[test]
    fn a_vring_of_the_daemon_is_served_to_the_end() {
        let guest = Guest::new(16);
        let (device, ports) = Bench::ports(1);
        let device = BlkDevice::for_daemon(Arc::new(device.disk().clone()), ports);
        let memory = GuestMemoryAtomic::new((*guest.memory).clone());
        device.update_memory(memory.clone()).unwrap();
        let vring = VringRwLock::new(memory, 16).unwrap();
        let ring = guest.addresses();
        vring.set_queue_info(ring.descriptors, ring.avail, ring.used).unwrap();
        vring.set_queue_size(16);
        vring.set_queue_ready(true);
        guest.write(DATA, &[0; 16]);
        for round in 0..3_u16 {
            for number in 0..4 {
                let buffers = [readable(DATA, 16), writable(DATA + 0x1000, 512), writable(DATA + 64, 1)];
                guest.offer(chain_from(&guest, number * 3, &buffers));
            }
            device.handle_event(0, EventSet::IN, std::slice::from_ref(&vring), 0).unwrap();
            for number in 0..4 {
                assert_eq!(guest.take_used(), Some((number * 3, 513)));
            }
            assert_eq!(vring.queue_next_avail(), (round + 1) * 4);
        }
        assert!(device.handle_event(9, EventSet::IN, &[vring], 0).is_ok());
    }

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
}
