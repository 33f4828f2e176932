//! The protocol thread's half of a connection: what the front-end said, turned into orders to workers.
//!
//! Nothing here waits for the disk except the messages that promise it: GET_VRING_BASE, removals of memory,
//! RESET_DEVICE, and the end of the connection.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::QUEUE_SIZE_MAX;
use super::command::wait;
use super::device::{BlkDevice, VHOST_USER_F_PROTOCOL_FEATURES};
use super::dirty::{DirtyLog, MaybeLog, VHOST_F_LOG_ALL};
use super::inflight::InflightRegion;
use super::memory::{MemoryMap, REGIONS_MAX, RegionAddress, RegionBits};
use super::ring::{Ring, RingAddresses, RingError};
use super::worker::{Command, QueueKick, StartQueue, StopHow};
use crate::runtime::mailbox::Outbox;
use crate::sync::mpsc::{Receiver, channel};

/// Protocol features on offer. Only what works: the crate drops STATUS.
pub(super) const FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD);

/// What the front-end has said of a queue.
#[derive(Default)]
struct QueueSetup {
    size: u16,
    addresses: Option<RingAddresses>,
    base: u16,
    kick: Option<QueueKick>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    enabled: bool,
    started: bool,
}

/// One connection.
pub(crate) struct Session {
    device: Arc<BlkDevice>,
    workers: Vec<Outbox<Command>>,
    queues: Vec<QueueSetup>,
    memory: Arc<MemoryMap>,
    inflight: Option<Arc<InflightRegion>>,
    features: u64,
    /// What SET_LOG_BASE gave; used while LOG_ALL is among the features.
    log: MaybeLog,
}

/// A refusal that the crate has answered, where an answer was asked for; the connection goes on.
fn refuse(reason: impl std::fmt::Display) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, reason.to_string()))
}

/// Whether the connection goes on after `error`.
pub(crate) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::ReqHandlerError(_))
}

impl Session {
    pub(crate) fn new(device: Arc<BlkDevice>, workers: Vec<Outbox<Command>>, queues: u16) -> Session {
        let queues = std::iter::repeat_with(QueueSetup::default).take(usize::from(queues)).collect();
        Session { device, workers, queues, memory: Arc::new(MemoryMap::new()), inflight: None, features: 0, log: None }
    }

    /// The end of the connection: every queue is stopped, the device has returned everything, and guest memory
    /// is no longer used. Requests that no device worked on stay in the in-flight region.
    pub(crate) fn close(&mut self) {
        if let Err(error) =
            self.stop_all(StopHow::Leave).and_then(|()| self.use_memory(MemoryMap::new(), RegionBits(u64::MAX)))
        {
            log::error!("the connection cannot be wound up: {error}");
        }
        self.inflight = None;
        self.log = None;
        self.use_log();
    }

    /// Features on offer: the device's, and those of the transport.
    fn offered_features(&self) -> u64 {
        self.device.offered_features() | 1 << VHOST_F_LOG_ALL
    }

    /// Have all workers log, or not, as was negotiated; from the return on they do.
    fn use_log(&self) {
        let log = self.log.as_ref().filter(|_| self.features & 1 << VHOST_F_LOG_ALL != 0);
        let (done, ends) = channel();
        for worker in &self.workers {
            worker.send(Command::DirtyLog { log: log.cloned(), done: done.clone() });
        }
        drop(done);
        for _ in &self.workers {
            wait(&ends, || "the dirty log".to_string());
        }
    }

    fn worker(&self, index: u16) -> &Outbox<Command> {
        // Fixed: a queue's requests never change threads.
        &self.workers[usize::from(index) % self.workers.len()]
    }

    fn queue(&mut self, index: u32) -> Result<(u16, &mut QueueSetup)> {
        let number = u16::try_from(index).map_err(|_| refuse(format!("there is no queue {index}")))?;
        let queue = self.queues.get_mut(usize::from(number));
        queue.map(|queue| (number, queue)).ok_or_else(|| refuse(format!("there is no queue {index}")))
    }

    /// Start a queue once everything is known: with its kick, or late ones when they are enabled.
    fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let memory = self.memory.clone();
        let inflight = self.inflight.clone();
        let (number, queue) = self.queue(index)?;
        let Some(addresses) = queue.addresses.filter(|_| queue.kick.is_some() && queue.size > 0 && !queue.started)
        else {
            return Ok(());
        };
        // The worker translates for itself; here it is checked so that the front-end hears of errors.
        Ring::new(&memory, addresses, queue.size, queue.base, event_idx).map_err(refuse)?;
        let start = StartQueue {
            index: number,
            addresses,
            size: queue.size,
            next_avail: queue.base,
            event_idx,
            inflight,
            kick: queue.kick.take().expect("just seen"),
            call: duplicate(queue.call.as_ref()),
            err: duplicate(queue.err.as_ref()),
            enabled: queue.enabled,
        };
        queue.started = true;
        self.worker(number).send(Command::Start(Box::new(start)));
        self.note_started();
        Ok(())
    }

    fn note_started(&self) {
        self.device.channel().set_started(self.queues.iter().any(|queue| queue.started));
    }

    /// Order a stop; the receiver gets the next avail entry, or is closed if the worker did not serve the queue.
    fn order_stop(&mut self, index: u16, how: StopHow) -> Receiver<u16> {
        let (reply, stopped) = channel();
        self.worker(index).send(Command::Stop { queue: index, how, reply });
        stopped
    }

    fn finish_stop(&mut self, index: u16, stopped: &Receiver<u16>) -> Result<()> {
        let base = wait(stopped, || format!("queue {index}"));
        let queue = &mut self.queues[usize::from(index)];
        queue.started = false;
        queue.kick = None;
        // A queue that its worker could not start has taken nothing.
        queue.base = base.unwrap_or(queue.base);
        self.note_started();
        Ok(())
    }

    fn stop_all(&mut self, how: StopHow) -> Result<()> {
        let started = self.queues.iter().enumerate().filter(|(_, queue)| queue.started);
        let started: Vec<u16> = started.map(|(i, _)| u16::try_from(i).expect("at most 64 queues")).collect();
        let stops: Vec<_> = started.into_iter().map(|index| (index, self.order_stop(index, how))).collect();
        stops.iter().try_for_each(|(index, stopped)| self.finish_stop(*index, stopped))
    }

    /// Change the memory of all workers and wait until no request uses `removed` (O5).
    fn use_memory(&mut self, map: MemoryMap, removed: RegionBits) -> Result<()> {
        self.memory = Arc::new(map);
        let (done, ends) = channel();
        for worker in &self.workers {
            worker.send(Command::Memory { map: self.memory.clone(), removed, done: done.clone() });
        }
        drop(done);
        if removed != RegionBits::default() {
            for _ in &self.workers {
                wait(&ends, || "memory that is being removed".to_string());
            }
        }
        Ok(())
    }

    /// Have the cache mode outlive this process.
    fn note_cache_mode(&self) {
        if let Some(region) = &self.inflight {
            region.set_write_through(!self.device.is_writeback());
        }
    }

    fn event_fd(file: Option<File>) -> Option<OwnedFd> {
        file.map(OwnedFd::from)
    }
}

/// Whether a worker can sleep on a kick: an eventfd, which is what the protocol speaks of, or a pipe. A file is
/// readable at any time, and what cannot be polled would end the worker.
fn check_kick(fd: &OwnedFd) -> Result<()> {
    let check = || {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::IN)
    };
    check().map_err(|errno| refuse(format!("the kick is no eventfd: {errno}")))
}

fn duplicate(fd: Option<&OwnedFd>) -> Option<OwnedFd> {
    fd.and_then(|fd| fd.try_clone().inspect_err(|error| log::error!("an eventfd is lost: {error}")).ok())
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated and without a common meaning; the spec advises to ignore it.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all(StopHow::Discard)?;
        for queue in &mut self.queues {
            queue.enabled = false;
            queue.base = 0;
        }
        self.inflight = None;
        self.device.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered_features();
        if unknown != 0 {
            return Err(refuse(format!("features {unknown:#x} were not offered")));
        }
        let changed = self.features ^ features;
        self.features = features;
        self.device.negotiated(features);
        if changed & 1 << VHOST_F_LOG_ALL != 0 {
            self.use_log();
        }
        if features & (1 << VHOST_USER_F_PROTOCOL_FEATURES) == 0 {
            // Without protocol features there is no SET_VRING_ENABLE: rings start enabled.
            for index in 0..self.queues.len() {
                self.set_vring_enable(u32::try_from(index).expect("at most 64 queues"), true)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions: Vec<_> = regions.iter().map(RegionAddress::of).zip(files).collect();
        let (map, removed) = self.memory.replaced_by(&regions).map_err(refuse)?;
        self.use_memory(map, removed)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX);
        let size = size.ok_or_else(|| refuse(RingError::Size(num)))?;
        let (number, queue) = self.queue(index)?;
        if queue.started && queue.size != size {
            return Err(refuse(format!("queue {number} is started: its size stays")));
        }
        queue.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = RingAddresses { descriptors: descriptor, avail: available, used, log };
        let memory = self.memory.clone();
        let (number, queue) = self.queue(index)?;
        let moved = queue.started && queue.addresses != Some(addresses);
        if moved {
            Ring::new(&memory, addresses, queue.size, 0, false).map_err(refuse)?;
        }
        queue.addresses = Some(addresses);
        if moved {
            self.worker(number).send(Command::Addresses { queue: number, addresses });
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (number, queue) = self.queue(index)?;
        if queue.started {
            return Err(refuse(format!("queue {number} is started: its place stays")));
        }
        // The upper half belongs to packed rings.
        queue.base = u16::try_from(base & 0xffff).expect("masked");
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // Its only answer is a state: an error must end the connection, or the front-end waits for ever.
        let (number, started) =
            self.queue(index).map(|(number, queue)| (number, queue.started)).map_err(|_| Error::InvalidParam)?;
        if started {
            let stopped = self.order_stop(number, StopHow::Drain);
            self.finish_stop(number, &stopped)?;
        }
        let queue = &mut self.queues[usize::from(number)];
        queue.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(queue.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = Self::event_fd(fd);
        fd.as_ref().map_or(Ok(()), check_kick)?;
        let kick = fd.map_or(QueueKick::Polled, QueueKick::Fd);
        let (number, queue) = self.queue(u32::from(index))?;
        if queue.started {
            self.worker(number).send(Command::Kick { queue: number, kick });
            return Ok(());
        }
        queue.kick = Some(kick);
        self.start_if_ready(u32::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (number, queue) = self.queue(u32::from(index))?;
        queue.call = Self::event_fd(fd);
        if queue.started {
            let call = duplicate(queue.call.as_ref());
            self.worker(number).send(Command::Call { queue: number, call });
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (number, queue) = self.queue(u32::from(index))?;
        queue.err = Self::event_fd(fd);
        if queue.started {
            let err = duplicate(queue.err.as_ref());
            self.worker(number).send(Command::Err { queue: number, err });
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(FEATURES)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // The crate keeps them. Reconnecting front-ends send this without having asked first.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::try_from(self.queues.len()).expect("at most 64 queues"))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (number, queue) = self.queue(index)?;
        queue.enabled = enable;
        if queue.started {
            self.worker(number).send(Command::Enable { queue: number, enabled: enable });
            Ok(())
        } else if enable {
            // QEMU enables rings that were never set up, too: nothing starts then.
            self.start_if_ready(index)
        } else {
            Ok(())
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // Flags differ between front-ends for the same thing: 0 in the spec, 1 in rust-vmm's.
        self.device.write_config(offset, buf).map_err(refuse)?;
        self.note_cache_mode();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(refuse("this is no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("there are no shared objects"))
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        // As for GET_VRING_BASE, no refusal can be said but by ending the connection.
        let (file, len) = InflightRegion::create(queues, size).map_err(|error| {
            log::warn!("{error}");
            Error::InvalidParam
        })?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (offset, len) = (inflight.mmap_offset, inflight.mmap_size);
        let region = InflightRegion::map(&file, offset, len, inflight.num_queues, inflight.queue_size);
        let region = region.map_err(refuse)?;
        // A process before this one may have been told.
        if region.is_write_through() {
            self.device.set_writeback(false);
        }
        self.inflight = Some(Arc::new(region));
        self.note_cache_mode();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(u64::try_from(REGIONS_MAX).expect("a constant"))
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let map = self.memory.with_region(RegionAddress::of(region), &fd).map_err(refuse)?;
        self.use_memory(map, RegionBits::default())?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = RegionAddress::of(region);
        let (map, removed) = self
            .memory
            .without_region(address)
            .ok_or_else(|| refuse(format!("there is no region of {:#x} bytes at {:#x}", address.len, address.guest)))?;
        self.use_memory(map, removed)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(refuse("there is no state to transfer"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refuse("there is no state to transfer"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("there is no shared memory"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        // Its only answer repeats the message: an error must end the connection, or the front-end waits for ever.
        let log = DirtyLog::map(&file, log.mmap_offset, log.mmap_size).map_err(|error| {
            log::warn!("{error}");
            Error::InvalidParam
        })?;
        self.log = Some(Arc::new(log));
        self.use_log();
        Ok(())
    }
}
