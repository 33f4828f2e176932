//! The driver's side of a queue in memory that outlives the servers: a virtio-blk driver that notices when a
//! request is answered twice.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::packed_ring::{PackedDriver, PackedParts};

/// Longest wait for an answer of the protocol.
const PROTOCOL_LIMIT: Duration = Duration::from_secs(30);

/// Requests a queue holds at most.
pub(crate) const DEPTH: usize = 16;
/// Descriptors each may use: header, two buffers, status.
const CHAIN: u16 = 4;
const SIZE: u16 = DEPTH as u16 * CHAIN;
/// Bytes of data of the longest request.
pub(crate) const DATA_MAX: usize = 128 << 10;

/// Offsets in a queue's part of memory; slots for requests follow.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOTS: u64 = 0x3000;
/// Offsets in a slot.
const STATUS: u64 = 0x10;
const TABLE: u64 = 0x40;
const DATA: u64 = 0x1000;
/// Room for data that does not begin at a page.
const SLOT_LEN: u64 = DATA + DATA_MAX as u64 + 0x1000;
const QUEUE_LEN: u64 = SLOTS + DEPTH as u64 * SLOT_LEN;

/// The front-end's own addresses are not those of the guest.
const USER: u64 = 0x5500_0000_0000;

const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PACKED: u64 = 1 << 34;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

type Descriptor = (u64, usize, u16, u16);

/// A request as the device sees it.
pub(crate) struct Wire {
    pub(crate) kind: u32,
    pub(crate) sector: u64,
    /// Bytes to the device, beside the header.
    pub(crate) readable: Vec<u8>,
    /// Bytes from the device, beside the status.
    pub(crate) writable: usize,
    /// Bytes by which the data misses a page boundary.
    pub(crate) skew: usize,
    /// Where the data is cut in two, unless that is outside.
    pub(crate) cut: usize,
    /// Whether its descriptors are in a table of their own.
    pub(crate) indirect: bool,
}

/// A used entry: which slot's request, its status, and bytes from the device.
pub(crate) struct Answer {
    pub(crate) slot: usize,
    pub(crate) status: u8,
    pub(crate) data: Vec<u8>,
}

/// A queue.
pub(crate) struct Ring {
    /// The ring, where it is a packed one. Buffer ids are then what heads are otherwise.
    packed: Option<PackedDriver>,
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    avail: u16,
    used: u16,
    event_idx: bool,
    /// Of the requests under way: bytes of data that the device may write, and the skew.
    under_way: [Option<(usize, usize)>; DEPTH],
    kick: EventFd,
    kicks: u64,
    call: EventFd,
}

/// A guest's memory and queues, and what a front-end keeps for it between servers.
pub(crate) struct Device {
    memory_file: Arc<File>,
    region_len: u64,
    pub(crate) rings: Vec<Ring>,
    /// Whether an in-flight region is kept; the region, once there is one.
    pub(crate) tracked: bool,
    inflight: Option<(VhostUserInflight, File)>,
    without: u64,
    /// Tells of notifications.
    called: Epoll,
}

/// Keeps the connection.
pub(crate) struct Session(#[expect(dead_code, reason = "held for its socket")] Frontend);

impl Device {
    /// Where a packed ring has come to only the in-flight region says.
    pub(crate) fn new(queues: usize, tracked: bool, event_idx: bool, packed: bool) -> Device {
        assert!(tracked || !packed, "a packed ring is tracked");
        let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = Arc::new(File::from(fd));
        // Two regions: some request's buffers cross from one into the other.
        let region_len = (queues as u64 * QUEUE_LEN).div_ceil(2).next_multiple_of(4096);
        file.set_len(2 * region_len).expect("memory");
        let len = usize::try_from(region_len).expect("small");
        let part = |start| (GuestAddress(start), len, Some(FileOffset::from_arc(file.clone(), start)));
        let memory = GuestMemoryMmap::from_ranges_with_files([part(0), part(region_len)]);
        let memory = Arc::new(memory.expect("mappings"));
        let driver = |base| {
            let parts = PackedParts { descriptors: base, driver: base + AVAIL, device: base + USED };
            PackedDriver::new(memory.clone(), parts, SIZE)
        };
        let ring = |index| Ring {
            packed: packed.then(|| driver(index as u64 * QUEUE_LEN)),
            memory: memory.clone(),
            base: index as u64 * QUEUE_LEN,
            avail: 0,
            used: 0,
            event_idx,
            under_way: [None; DEPTH],
            kick: EventFd::new(0).expect("an eventfd"),
            kicks: 0,
            call: EventFd::new(EFD_NONBLOCK).expect("an eventfd"),
        };
        let rings: Vec<Ring> = (0..queues).map(ring).collect();
        let called = Epoll::new().expect("an epoll instance");
        for ring in &rings {
            let readable = EpollEvent::new(EventSet::IN, 0);
            called.ctl(ControlOperation::Add, ring.call.as_raw_fd(), readable).expect("an eventfd can be watched");
        }
        let without = if event_idx { 0 } else { F_EVENT_IDX } | if packed { 0 } else { F_PACKED };
        Device { memory_file: file, region_len, rings, tracked, inflight: None, without, called }
    }

    /// Connect, or connect again: the rings go on where they are.
    pub(crate) fn connect(&mut self, socket: &Path) -> Result<Session, vhost::Error> {
        let io = |error| vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::SocketConnect(error));
        let stream = UnixStream::connect(socket).map_err(io)?;
        stream.set_read_timeout(Some(PROTOCOL_LIMIT)).map_err(io)?;
        let mut session = Frontend::from_stream(stream, self.rings.len() as u64);
        session.set_owner()?;
        let features = session.get_features()?;
        let needed = (F_INDIRECT | F_EVENT_IDX | F_PACKED) & !self.without;
        assert!(features & needed == needed, "{features:x}");
        session.set_features(features & !self.without)?;
        let mut protocol_features = session.get_protocol_features()?;
        if !self.tracked {
            protocol_features.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        }
        session.set_protocol_features(protocol_features)?;
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        session.get_queue_num()?;
        if self.tracked {
            if self.inflight.is_none() {
                let queues = u16::try_from(self.rings.len()).expect("few");
                let wanted = VhostUserInflight { num_queues: queues, queue_size: SIZE, ..Default::default() };
                self.inflight = Some(session.get_inflight_fd(&wanted)?);
            }
            let (inflight, file) = self.inflight.as_ref().expect("just made");
            session.set_inflight_fd(inflight, file.as_raw_fd())?;
        }
        let region = |start| VhostUserMemoryRegionInfo {
            guest_phys_addr: start,
            memory_size: self.region_len,
            userspace_addr: USER + start,
            mmap_offset: start,
            mmap_handle: self.memory_file.as_raw_fd(),
        };
        session.set_mem_table(&[region(0), region(self.region_len)])?;
        for (queue, ring) in self.rings.iter().enumerate() {
            ring.start(&mut session, queue)?;
        }
        Ok(Session(session))
    }

    /// Wait for a notification, at most so long, unless there are answers already.
    pub(crate) fn wait(&self, limit: Duration) {
        if self.rings.iter().all(Ring::arm) {
            let limit = i32::try_from(limit.as_millis()).expect("short");
            let _ = self.called.wait(limit, &mut [EpollEvent::default()]);
        }
    }
}

impl Ring {
    fn start(&self, session: &mut Frontend, queue: usize) -> Result<(), vhost::Error> {
        let config = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: USER + self.base,
            used_ring_addr: USER + self.base + USED,
            avail_ring_addr: USER + self.base + AVAIL,
            log_addr: None,
        };
        session.set_vring_num(queue, SIZE)?;
        session.set_vring_addr(queue, &config)?;
        // As QEMU does when the back-end that it could have asked is gone. Of a packed ring nothing can be said.
        session.set_vring_base(queue, if self.packed.is_some() { 0 } else { self.used_idx() })?;
        session.set_vring_call(queue, &self.call)?;
        session.set_vring_kick(queue, &self.kick)?;
        session.set_vring_enable(queue, true)
    }

    /// How it stands: for a test that has failed.
    pub(crate) fn describe(&self) -> String {
        let slots: Vec<usize> = (0..DEPTH).filter(|slot| self.under_way[*slot].is_some()).collect();
        match &self.packed {
            Some(driver) => format!(
                "packed, event index {}, {} kicks, slots {slots:?}, offered to {:#x}, taken to {:#x}, the device has come \
                 to {:#x}, and wants to be told of (place, flags) {:#x?}",
                self.event_idx,
                self.kicks,
                driver.avail_place(),
                driver.used_place(),
                driver.shown_place(),
                driver.device_event()
            ),
            None => format!(
                "split, event index {}, {} kicks, slots {slots:?}, offered to {}, taken to {}, the device has come to {}, \
                 and wants to be told of {}",
                self.event_idx,
                self.kicks,
                self.avail,
                self.used,
                self.used_idx(),
                self.load(self.base + USED + 4 + 8 * u64::from(SIZE))
            ),
        }
    }

    pub(crate) fn free_slot(&self) -> Option<usize> {
        self.under_way.iter().position(Option::is_none)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("guest memory");
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
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

    fn used_idx(&self) -> u16 {
        self.load(self.base + USED + 2)
    }

    fn descriptors(&self, at: u64, descriptors: &[Descriptor]) {
        let (flags_at, next_at) = if self.packed.is_some() { (112, 96) } else { (96, 112) };
        let bytes = descriptors.iter().flat_map(|&(addr, len, flags, next)| {
            let word = u128::from(addr) | (len as u128) << 64;
            (word | u128::from(flags) << flags_at | u128::from(next) << next_at).to_le_bytes()
        });
        self.write(at, &bytes.collect::<Vec<_>>());
    }

    /// Make a request available in a free slot, and kick if the device wants that.
    pub(crate) fn submit(&mut self, slot: usize, wire: &Wire) {
        let at = self.base + SLOTS + slot as u64 * SLOT_LEN;
        let header = [&wire.kind.to_le_bytes()[..], &[0; 4], &wire.sector.to_le_bytes()].concat();
        self.write(at, &header);
        self.write(at + STATUS, &[0xff]);
        let (len, from_device) = match wire.writable {
            0 => (wire.readable.len(), 0),
            writable => (writable, WRITE),
        };
        let data = at + DATA + wire.skew as u64;
        // What the device does not write must not pass for data.
        self.write(data, &if from_device == 0 { wire.readable.clone() } else { vec![0xee; len] });
        let cut = wire.cut.min(len);
        let parts = [(data, cut), (data + cut as u64, len - cut)];
        let mut chain: Vec<Descriptor> = vec![(at, 16, 0, 0)];
        chain.extend(parts.iter().filter(|part| part.1 > 0).map(|&(addr, len)| (addr, len, from_device, 0)));
        chain.push((at + STATUS, 1, WRITE, 0));
        let head = u16::try_from(slot).expect("few") * CHAIN;
        let first = if wire.indirect { 0 } else { head };
        let last = chain.len() - 1;
        for (descriptor, number) in chain[..last].iter_mut().zip(first + 1..) {
            descriptor.2 |= NEXT;
            descriptor.3 = number;
        }
        if wire.indirect {
            self.descriptors(at + TABLE, &chain);
            chain = vec![(at + TABLE, 16 * chain.len(), INDIRECT, 0)];
        }
        if self.packed.is_none() {
            self.descriptors(self.base + 16 * u64::from(head), &chain);
        }
        let before = self.under_way[slot].replace((wire.writable, wire.skew));
        assert!(before.is_none(), "slot {slot} is in use");
        if self.offer(head, &chain) {
            self.kick.write(1).expect("an eventfd takes a write");
            self.kicks += 1;
        }
    }

    /// Make a chain available; whether the device wants to be kicked for it.
    fn offer(&mut self, head: u16, chain: &[Descriptor]) -> bool {
        if let Some(driver) = &self.packed {
            let element =
                |&(addr, len, flags, _): &Descriptor| (addr, u32::try_from(len).expect("short"), flags & !NEXT);
            let before = driver.avail_place();
            driver.offer(head, &chain.iter().map(element).collect::<Vec<_>>());
            fence(Ordering::SeqCst);
            return driver.wants_kick(before, self.event_idx);
        }
        self.store(self.base + AVAIL + 4 + 2 * u64::from(self.avail % SIZE), head);
        self.avail = self.avail.wrapping_add(1);
        self.store(self.base + AVAIL + 2, self.avail);
        // What the device asks for is read after it can see the entry.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // virtio 1.3 §2.7.10: the entry just made available is the one asked for.
            self.load(self.base + USED + 4 + 8 * u64::from(SIZE)) == self.avail.wrapping_sub(1)
        } else {
            self.load(self.base + USED) & 1 == 0
        }
    }

    /// Ask for a notification of the next answer; false if there is one already.
    fn arm(&self) -> bool {
        let _ = self.call.read();
        if let Some(driver) = &self.packed {
            driver.want_interrupt(self.event_idx);
            fence(Ordering::SeqCst);
            return driver.shown_place() == driver.used_place();
        }
        if self.event_idx {
            self.store(self.base + AVAIL + 4 + 2 * u64::from(SIZE), self.used);
        }
        // The device may use an entry before it sees that; then it is there now.
        fence(Ordering::SeqCst);
        self.used_idx() == self.used
    }

    /// The answers that are there.
    pub(crate) fn answers(&mut self) -> Vec<Answer> {
        let mut answers = Vec::new();
        while let Some((id, len)) = self.packed.as_ref().and_then(PackedDriver::take_used) {
            answers.push(self.answer(id.into(), len));
        }
        while self.packed.is_none() && self.used_idx() != self.used {
            let at = self.base + USED + 4 + 8 * u64::from(self.used % SIZE);
            self.used = self.used.wrapping_add(1);
            let word = |at| u32::from_le_bytes(self.read(at, 4).try_into().expect("four bytes"));
            answers.push(self.answer(word(at), word(at + 4)));
        }
        answers
    }

    fn answer(&mut self, head: u32, used_len: u32) -> Answer {
        let slot = usize::try_from(head / u32::from(CHAIN)).expect("small");
        let known = head.is_multiple_of(u32::from(CHAIN)) && slot < DEPTH;
        let under_way = if known { self.under_way[slot].take() } else { None };
        let Some((writable, skew)) = under_way else {
            panic!("an answer to descriptor {head}, which is not under way: a request was answered twice")
        };
        let at = self.base + SLOTS + slot as u64 * SLOT_LEN;
        let status = self.read(at + STATUS, 1)[0];
        assert!(status <= 1, "status {status} of descriptor {head}");
        if status == 0 {
            assert_eq!(usize::try_from(used_len).expect("small"), writable + 1, "bytes used of descriptor {head}");
        }
        Answer { slot, status, data: self.read(at + DATA + skew as u64, writable) }
    }
}
