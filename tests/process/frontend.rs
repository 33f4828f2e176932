//! A front-end made of single steps: the protocol by the `vhost` crate's front-end half, rings and chains by hand.
//!
//! [`Guest`](crate::guest::Guest) is a well-behaved driver. This one writes any descriptor anywhere, also such
//! as no driver should, and shows what came back byte for byte.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
    VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::packed::Packed;
use crate::packed_ring::{PackedDriver, PackedParts};

/// Longest wait for an answer of the protocol.
const PROTOCOL_LIMIT: Duration = Duration::from_secs(30);

/// Guest memory has three adjacent regions of so many bytes.
pub(crate) const REGION: u64 = 4 << 20;
pub(crate) const MEMORY_END: u64 = 3 * REGION;
/// The front-end's own addresses are not those of the guest.
const USER: u64 = 0x5500_0000_0000;

/// Rings lie at the start of memory, this far apart.
const RING_SPAN: u64 = 0x10_0000;
const AVAIL: u64 = 0x8_0000;
const USED: u64 = 0xa_0000;

/// Each ring's buffers may lie in so many bytes, which cross from one region into the next.
pub(crate) const AREA: u64 = 4 << 20;

pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_INDIRECT: u64 = 1 << 28;
/// The front-end has the device note what it writes.
pub(crate) const F_LOG_ALL: u64 = 1 << 26;
/// Rings are packed.
pub(crate) const F_PACKED: u64 = 1 << 34;

pub(crate) const PAGE: u64 = 4096;
/// Bytes of a dirty log of all guest memory.
pub(crate) const LOG_BYTES: u64 = MEMORY_END / PAGE / 8;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor as it is written: address, length, flags, next.
pub(crate) type Raw = (u64, u32, u16, u16);

/// What to negotiate and set up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) queues: usize,
    /// Entries of each.
    pub(crate) size: u16,
    /// Feature bits to refuse.
    pub(crate) without: u64,
}

/// A connection and its rings.
pub(crate) struct FrontEnd {
    session: Frontend,
    /// What the back-end offers.
    pub(crate) features: u64,
    /// What was taken of it.
    accepted: u64,
    pub(crate) protocol_features: VhostUserProtocolFeatures,
    pub(crate) rings: Vec<Ring>,
    file: Arc<File>,
}

/// The driver's side of one ring. What is said of heads and descriptors is true of a packed ring, too: a chain of
/// such descriptors is put into it when it is offered, with its head as buffer id.
pub(crate) struct Ring {
    packed: Option<Packed>,
    memory: Arc<GuestMemoryMmap>,
    index: usize,
    base: u64,
    pub(crate) size: u16,
    event_idx: bool,
    avail: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
    called: Epoll,
}

impl FrontEnd {
    /// Connect, negotiate and start the rings.
    pub(crate) fn connect(socket: &Path, setup: Setup) -> FrontEnd {
        FrontEnd::over(UnixStream::connect(socket).expect("a back-end listens"), setup)
    }

    /// As [`FrontEnd::connect`], with packed rings.
    pub(crate) fn packed(socket: &Path, setup: Setup) -> FrontEnd {
        FrontEnd::set_up(UnixStream::connect(socket).expect("a back-end listens"), setup, true)
    }

    /// As [`FrontEnd::connect`], over a socket that is connected.
    pub(crate) fn over(stream: UnixStream, setup: Setup) -> FrontEnd {
        FrontEnd::set_up(stream, setup, false)
    }

    fn set_up(stream: UnixStream, setup: Setup, packed: bool) -> FrontEnd {
        stream.set_read_timeout(Some(PROTOCOL_LIMIT)).expect("a socket");
        let mut session = Frontend::from_stream(stream, setup.queues as u64);
        session.set_owner().unwrap();
        let features = session.get_features().unwrap();
        let refused = setup.without | F_LOG_ALL | if packed { 0 } else { F_PACKED };
        let accepted = features & !refused;
        session.set_features(accepted).unwrap();
        let protocol_features = session.get_protocol_features().unwrap();
        session.set_protocol_features(protocol_features - VhostUserProtocolFeatures::INFLIGHT_SHMFD).unwrap();
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        session.get_queue_num().unwrap();
        let (file, memory) = guest_memory();
        let region = |start| region_of(&file, start);
        session.set_mem_table(&[region(0), region(REGION), region(2 * REGION)]).unwrap();
        let ring = |index| Ring::new(memory.clone(), index, setup.size, accepted);
        let rings = (0..setup.queues).map(ring).collect();
        let mut front_end = FrontEnd { session, features, accepted, protocol_features, rings, file };
        (0..setup.queues).for_each(|queue| front_end.start(queue, 0));
        front_end
    }

    /// Start a ring that is stopped, empty, at that entry.
    pub(crate) fn start(&mut self, queue: usize, base: u16) {
        let ring = &mut self.rings[queue];
        ring.restart_at(base);
        self.session.set_vring_num(queue, ring.size).unwrap();
        self.session.set_vring_addr(queue, &ring.config(false)).unwrap();
        self.session.set_vring_base(queue, base).unwrap();
        self.session.set_vring_call(queue, &ring.call).unwrap();
        self.session.set_vring_kick(queue, &ring.kick).unwrap();
        self.session.set_vring_enable(queue, true).unwrap();
    }

    /// Have the device note in `log`, from the given byte on, what it writes to guest memory and its rings.
    pub(crate) fn log_to(&mut self, log: &File, start: u64) {
        let (mmap_size, mmap_handle) = (LOG_BYTES, log.as_raw_fd());
        let region = VhostUserDirtyLogRegion { mmap_size, mmap_offset: start, mmap_handle };
        self.session.set_log_base(0, Some(region)).unwrap();
        self.session.set_features(self.accepted | F_LOG_ALL).unwrap();
        for (queue, ring) in self.rings.iter().enumerate() {
            self.session.set_vring_addr(queue, &ring.config(true)).unwrap();
        }
    }

    /// End that.
    pub(crate) fn log_no_more(&mut self) {
        self.session.set_features(self.accepted).unwrap();
        for (queue, ring) in self.rings.iter().enumerate() {
            self.session.set_vring_addr(queue, &ring.config(false)).unwrap();
        }
    }

    /// Be told of changes; where to hear of them.
    pub(crate) fn listen(&mut self) -> UnixStream {
        let (theirs, ours) = UnixStream::pair().expect("sockets");
        self.session.set_backend_request_fd(&theirs).unwrap();
        ours.set_read_timeout(Some(PROTOCOL_LIMIT)).expect("a socket");
        ours
    }

    /// The guest's memory, to be looked at from outside.
    pub(crate) fn memory(&self) -> &Arc<File> {
        &self.file
    }

    /// Stop a ring; the next entry that it takes.
    pub(crate) fn stop(&mut self, queue: usize) -> u16 {
        let base = self.session.get_vring_base(queue).unwrap();
        u16::try_from(base & 0xffff).expect("masked")
    }

    /// The device's state, for a guest that leaves; nothing if it is refused.
    pub(crate) fn save_state(&mut self) -> Option<Vec<u8>> {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let writer = OwnedFd::from(writer);
        let direction = VhostTransferStateDirection::SAVE;
        let own = self.session.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, writer).ok()?;
        assert!(own.is_none(), "the channel is ours");
        let mut state = Vec::new();
        reader.read_to_end(&mut state).expect("the pipe's end");
        self.session.check_device_state().ok().map(|()| state)
    }

    /// Whether a guest may come with this state.
    pub(crate) fn load_state(&mut self, state: &[u8]) -> bool {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let reader = OwnedFd::from(reader);
        let direction = VhostTransferStateDirection::LOAD;
        if self.session.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, reader).is_err() {
            return false;
        }
        let state = state.to_vec();
        // Whoever has read enough closes the pipe.
        let written = std::thread::spawn(move || writer.write_all(&state).is_ok());
        let taken = self.session.check_device_state().is_ok();
        written.join().expect("a writer") && taken
    }

    /// Reset the device and negotiate again; all rings are stopped.
    pub(crate) fn reset(&mut self) {
        self.session.reset_device().unwrap();
        self.session.set_features(self.accepted).unwrap();
    }

    /// Stop a ring and have it go on where it stopped, while its driver may be waiting. With `kick` and `call` of
    /// the ring, as it may be in other hands.
    pub(crate) fn interrupt(&mut self, queue: usize, (kick, call): &(EventFd, EventFd)) {
        let base = self.stop(queue);
        self.session.set_vring_base(queue, base).unwrap();
        self.session.set_vring_call(queue, call).unwrap();
        self.session.set_vring_kick(queue, kick).unwrap();
        self.session.set_vring_enable(queue, true).unwrap();
    }

    /// Whether a queue may be served now.
    pub(crate) fn enable(&mut self, queue: usize, enabled: bool) {
        self.session.set_vring_enable(queue, enabled).unwrap();
    }

    /// Give the device memory beyond the guest's own, where no buffer is, and take it back.
    pub(crate) fn lend_memory(&mut self) {
        let extra = VhostUserMemoryRegionInfo { guest_phys_addr: MEMORY_END, ..region_of(&self.file, 0) };
        let extra = VhostUserMemoryRegionInfo { userspace_addr: USER + MEMORY_END, ..extra };
        self.session.add_mem_region(&extra).unwrap();
        self.session.remove_mem_region(&extra).unwrap();
    }

    /// Take a region back that requests use, and give it again.
    pub(crate) fn swap_memory(&mut self) {
        self.session.remove_mem_region(&region_of(&self.file, 2 * REGION)).unwrap();
        self.session.add_mem_region(&region_of(&self.file, 2 * REGION)).unwrap();
    }

    /// As [`FrontEnd::swap_memory`], by a whole new table.
    pub(crate) fn replace_memory(&mut self) {
        self.session.set_mem_table(&[region_of(&self.file, 0), region_of(&self.file, REGION)]).unwrap();
        self.session.set_mem_table(&[0, REGION, 2 * REGION].map(|start| region_of(&self.file, start))).unwrap();
    }

    pub(crate) fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let buffer = vec![0; len as usize];
        self.session.get_config(offset, len, VhostUserConfigFlags::empty(), &buffer).unwrap().1
    }

    /// Whether the back-end says that it has taken it.
    pub(crate) fn set_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        self.session.set_config(offset, VhostUserConfigFlags::empty(), bytes).is_ok()
    }
}

pub(crate) fn region_of(file: &File, start: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: start,
        memory_size: REGION,
        userspace_addr: USER + start,
        mmap_offset: start,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Start of the memory for a ring's buffers.
pub(crate) fn area_of(ring: usize) -> u64 {
    REGION / 2 + ring as u64 * AREA
}

/// New memory of a guest, at the same places of its file, and our view of it.
pub(crate) fn guest_memory() -> (Arc<File>, Arc<GuestMemoryMmap>) {
    let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(MEMORY_END).expect("memory");
    let file = Arc::new(file);
    let part = |start| (GuestAddress(start), REGION as usize, Some(FileOffset::from_arc(file.clone(), start)));
    let memory = GuestMemoryMmap::from_ranges_with_files([part(0), part(REGION), part(2 * REGION)]);
    (file, Arc::new(memory.expect("mappings")))
}

impl Ring {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>, index: usize, size: u16, features: u64) -> Ring {
        let (kick, call) = (EventFd::new(0).expect("an eventfd"), EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let called = Epoll::new().expect("an epoll instance");
        let readable = EpollEvent::new(EventSet::IN, 0);
        called.ctl(ControlOperation::Add, call.as_raw_fd(), readable).expect("an eventfd can be watched");
        let base = index as u64 * RING_SPAN;
        let parts = PackedParts { descriptors: base, driver: base + AVAIL, device: base + USED };
        let packed = (features & F_PACKED != 0).then(|| Packed::new(PackedDriver::new(memory.clone(), parts, size)));
        let event_idx = features & F_EVENT_IDX != 0;
        Ring { packed, memory, index, base, size, event_idx, avail: 0, used: 0, kick, call, called }
    }

    /// Where in guest memory descriptors, used and available ring are.
    pub(crate) fn parts(&self) -> [u64; 3] {
        [self.base, self.base + USED, self.base + AVAIL]
    }

    /// Empty, as a driver makes it that starts at that entry.
    pub(crate) fn restart_at(&mut self, base: u16) {
        if let Some(packed) = &self.packed {
            assert_eq!(base, 0, "drivers of packed rings begin at their start");
            packed.driver.restart();
        }
        (self.avail, self.used) = (base, base);
        self.write(self.base + AVAIL, &[0, 0]);
        self.write(self.base + USED, &[0, 0]);
        self.store(self.base + AVAIL + 2, base);
        self.store(self.base + USED + 2, base);
    }

    pub(crate) fn config(&self, logged: bool) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: u32::from(logged),
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.base + USED,
            avail_ring_addr: USER + self.base + AVAIL,
            log_addr: logged.then_some(self.used_ring()),
        }
    }

    /// Where its used ring is in guest memory.
    pub(crate) fn used_ring(&self) -> u64 {
        self.base + USED
    }

    /// The pages that the device writes, of a ring that fits in one.
    pub(crate) fn device_pages(&self) -> Vec<u64> {
        let used = self.used_ring() / PAGE;
        if self.packed.is_some() { vec![self.base / PAGE, used] } else { vec![used] }
    }

    /// Start of the memory for this ring's buffers.
    pub(crate) fn area(&self) -> u64 {
        area_of(self.index)
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("guest memory");
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).expect("guest memory");
        bytes
    }

    fn store(&self, at: u64, value: u16) {
        self.memory.store(value, GuestAddress(at), Ordering::Release).expect("guest memory");
    }

    fn load(&self, at: u64) -> u16 {
        self.memory.load(GuestAddress(at), Ordering::Acquire).expect("guest memory")
    }

    /// Write descriptors to a table at any address.
    pub(crate) fn table(&self, at: u64, entries: &[Raw]) {
        let (flags_at, next_at) = if self.packed.is_some() { (112, 96) } else { (96, 112) };
        let bytes = entries.iter().flat_map(|&(addr, len, flags, next)| {
            let word = u128::from(addr) | u128::from(len) << 64;
            (word | u128::from(flags) << flags_at | u128::from(next) << next_at).to_le_bytes()
        });
        self.write(at, &bytes.collect::<Vec<_>>());
    }

    /// Write one descriptor of the ring's own table.
    pub(crate) fn descriptor(&self, index: u16, descriptor: Raw) {
        if let Some(packed) = &self.packed {
            packed.write(index, descriptor);
            return;
        }
        self.table(self.base + 16 * u64::from(index), &[descriptor]);
    }

    /// Make a chain available, and kick if the device wants that.
    pub(crate) fn offer(&mut self, head: u16) {
        if let Some(packed) = &self.packed {
            if packed.offer(head, self.event_idx) {
                self.kick();
            }
            return;
        }
        let element = u64::from(self.avail % self.size);
        self.store(self.base + AVAIL + 4 + 2 * element, head);
        self.avail = self.avail.wrapping_add(1);
        self.store(self.base + AVAIL + 2, self.avail);
        // What the device asks for is read after it can see the entry.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            // virtio 1.3 §2.7.10: the entry just made available is the one asked for.
            self.load(self.base + USED + 4 + 8 * u64::from(self.size)) == self.avail.wrapping_sub(1)
        } else {
            self.load(self.base + USED) & 1 == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Its kick and its call, for others.
    pub(crate) fn events(&self) -> (EventFd, EventFd) {
        (self.kick.try_clone().expect("a descriptor"), self.call.try_clone().expect("a descriptor"))
    }

    pub(crate) fn raw_events(&self) -> (RawFd, RawFd) {
        (self.kick.as_raw_fd(), self.call.as_raw_fd())
    }

    pub(crate) fn kick(&self) {
        self.kick.write(1).expect("an eventfd takes a write");
    }

    /// Claim so many available entries more than there are, or (65535) one less.
    pub(crate) fn lie(&self, more: u16) {
        self.store(self.base + AVAIL + 2, self.avail.wrapping_add(more));
        self.kick();
    }

    /// Entries made available since the start; of a packed ring, the place of the next.
    pub(crate) fn avail_idx(&self) -> u16 {
        self.packed.as_ref().map_or(self.avail, |packed| packed.driver.avail_place())
    }

    /// Entries used since the start, as the device shows them; of a packed ring, the place of the next.
    pub(crate) fn used_idx(&self) -> u16 {
        self.packed.as_ref().map_or_else(|| self.load(self.base + USED + 2), |packed| packed.driver.shown_place())
    }

    /// What GET_VRING_BASE says when all that is not used is left for the next start.
    pub(crate) fn used_base(&self) -> u32 {
        let used = u32::from(self.used_idx());
        if self.packed.is_some() { used | used << 16 } else { used }
    }

    /// The next used entry, if it is there; otherwise a notification is asked for.
    fn next_used(&mut self) -> Option<(u32, u32)> {
        if let Some(packed) = &self.packed {
            return packed.next_used(self.event_idx);
        }
        if self.event_idx {
            self.store(self.base + AVAIL + 4 + 2 * u64::from(self.size), self.used);
            // The device may use an entry before it sees that; then it is there now.
            fence(Ordering::SeqCst);
        }
        (self.used_idx() != self.used).then(|| {
            let at = self.base + USED + 4 + 8 * u64::from(self.used % self.size);
            self.used = self.used.wrapping_add(1);
            let word = |at| u32::from_le_bytes(self.read(at, 4).try_into().expect("four bytes"));
            (word(at), word(at + 4))
        })
    }

    /// The next used entry, head and length, within `limit`. Only a notification ends the wait.
    pub(crate) fn take(&mut self, limit: Duration) -> Option<(u32, u32)> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(used) = self.next_used() {
                return Some(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = i32::try_from(left.as_millis()).expect("seconds");
            if timeout == 0 {
                return None;
            }
            match self.called.wait(timeout, &mut [EpollEvent::default()]) {
                Ok(_) => drop(self.call.read()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("epoll: {error}"),
            }
        }
    }
}
