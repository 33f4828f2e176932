//! The messages of the vhost-user protocol, and what each does to a `Session`.
//!
//! Nothing here waits for the disk except the messages that promise it: GET_VRING_BASE, removals of memory,
//! RESET_DEVICE, and the end of the connection.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg, VhostUserSingleMemoryRegion,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::QUEUE_SIZE_MAX;
use super::device::VHOST_USER_F_PROTOCOL_FEATURES;
use super::dirty::{DirtyLog, VHOST_F_LOG_ALL};
use super::eventfd::{check_kick, duplicate, event_fd};
use super::inflight::{INFLIGHT_MIGRATION, InflightRegion, drain_of};
use super::memory::{REGIONS_MAX, RegionAddress, RegionBits};
use super::ring::{Ring, RingAddresses, RingError};
use super::session::{Session, refuse};
use super::state;
use super::worker::{Command, QueueKick, StopHow};

/// Protocol features on offer. Only what works: the crate drops STATUS.
pub(super) const FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(INFLIGHT_MIGRATION)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// What the front-end has said of a queue.
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
        if let Some(region) = self.inflight.take() {
            region.forget_packed();
        }
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
        if changed & 1 << VIRTIO_F_RING_PACKED != 0 && self.queues.iter().any(|queue| queue.started) {
            return Err(refuse("queues are started: their rings stay split or packed"));
        }
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
        // Of packed rings no power of two is asked (virtio 1.3 §2.8.10.1).
        let legal = |size: u16| size.is_power_of_two() || (size > 0 && self.ring_format().packed);
        let size = u16::try_from(num).ok().filter(|size| *size <= QUEUE_SIZE_MAX && legal(*size));
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
        let (memory, format) = (self.memory.clone(), self.ring_format());
        let (number, queue) = self.queue(index)?;
        let moved = queue.started && queue.addresses != Some(addresses);
        if moved {
            Ring::check(&memory, addresses, queue.size, format).map_err(refuse)?;
        }
        queue.addresses = Some(addresses);
        if moved {
            self.worker(number).send(Command::Addresses { queue: number, addresses });
        }
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        // The upper half belongs to packed rings.
        let mask = if self.ring_format().packed { u32::MAX } else { 0xffff };
        let (number, queue) = self.queue(index)?;
        if queue.started {
            return Err(refuse(format!("queue {number} is started: its place stays")));
        }
        queue.base = base & mask;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // Its only answer is a state: an error must end the connection, or the front-end waits for ever.
        let (number, started) =
            self.queue(index).map(|(number, queue)| (number, queue.started)).map_err(|_| Error::InvalidParam)?;
        if started {
            let stopped = self.order_stop(number, self.drain);
            self.finish_stop(number, &stopped)?;
            if self.is_logging() {
                self.dismiss();
            }
        }
        let queue = &mut self.queues[usize::from(number)];
        queue.kick = None;
        Ok(VhostUserVringState::new(index, queue.base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = event_fd(fd);
        fd.as_ref().map_or(Ok(()), check_kick).map_err(|errno| refuse(format!("the kick is no eventfd: {errno}")))?;
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
        queue.call = event_fd(fd);
        if queue.started {
            let call = duplicate(queue.call.as_ref());
            self.worker(number).send(Command::Call { queue: number, call });
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (number, queue) = self.queue(u32::from(index))?;
        queue.err = event_fd(fd);
        if queue.started {
            let err = duplicate(queue.err.as_ref());
            self.worker(number).send(Command::Err { queue: number, err });
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.drain = drain_of(features);
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
        let (file, len) = InflightRegion::create(queues, size, self.ring_format().packed).map_err(|error| {
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
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        if self.queues.iter().any(|queue| queue.started) {
            return Err(refuse("a queue is started: its state cannot be transferred"));
        }
        match direction {
            VhostTransferStateDirection::SAVE => self.save_state(&fd)?,
            VhostTransferStateDirection::LOAD => self.state = Some(fd),
        }
        Ok(None)
    }

    /// After a load: whether the guest may go on here. A state that was saved is all in the pipe by now.
    fn check_device_state(&mut self) -> Result<()> {
        let Some(fd) = self.state.take() else { return Ok(()) };
        let held = self.crew.held().ok_or_else(|| refuse("the volume cannot change hands"))?;
        let state = state::read(&fd).map_err(refuse)?;
        self.generation = Some(held.check(&state).map_err(|error| {
            log::error!("{error}");
            refuse("the guest has used another disk")
        })?);
        Ok(())
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
