//! A guest with one queue and a worker of its own, and somebody who sleeps on an eventfd.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress};

use crate::runtime::worker::WorkerPort;
use crate::sync;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::mpsc::channel;
use crate::vhost::device::{BlkDevice, Settings};
use crate::vhost::memory::RegionBits;
use crate::vhost::ring::RingFormat;
use crate::vhost::status::WorkerStatus;
use crate::vhost::testing::packed::PackedDriver;
use crate::vhost::testing::{DATA, Guest, chain_from, readable, writable};
use crate::vhost::thread::WorkerThread;
use crate::vhost::worker::{Command, QueueKick, StartQueue, StopHow, spawn};

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// What a status byte holds before the device writes it.
pub(super) const UNTOUCHED: u8 = 0xee;
/// Requests of a driver at a time, at most.
pub(super) const REQUESTS: u16 = 5;

pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Sleeps until an eventfd is signalled.
pub(super) struct Sleeper(OwnedFd);

impl Sleeper {
    pub(super) fn on(event: BorrowedFd<'_>) -> Sleeper {
        let epoll = epoll::create(CreateFlags::CLOEXEC).unwrap();
        epoll::add(&epoll, event, EventData::new_u64(0), EventFlags::IN | EventFlags::ET).unwrap();
        Sleeper(epoll)
    }

    pub(super) fn sleep(&self) {
        sync::wait(self.0.as_fd(), None, &mut Vec::with_capacity(1)).unwrap();
    }
}

/// A request that a driver can make.
#[derive(Clone, Copy, Debug)]
pub(super) enum Io {
    Read(u64),
    Write(u64, u8),
    Flush,
}

/// A virtio-blk driver with one queue, which notifies only where the device wants it.
pub(super) struct Driver {
    pub(super) guest: Guest,
    pub(super) kick: OwnedFd,
    pub(super) call: OwnedFd,
    /// Where the data of its requests is.
    pub(super) data: u64,
    interrupts: Sleeper,
    /// Touched where another thread may go on.
    point: AtomicBool,
    packed: Option<Packed>,
}

/// The driver's half of a packed ring.
struct Packed {
    driver: PackedDriver,
    event_idx: bool,
    /// The place of what was offered last.
    offered: Cell<u16>,
    /// Requests that came back and were not yet asked for.
    back: RefCell<Vec<u16>>,
}

impl Driver {
    pub(super) fn new() -> Driver {
        let (kick, call) = (event(), event());
        let interrupts = Sleeper::on(call.as_fd());
        let point = AtomicBool::new(false);
        Driver { guest: Guest::new(16), kick, call, data: DATA, interrupts, point, packed: None }
    }

    /// One whose ring is packed.
    pub(super) fn packed(event_idx: bool) -> Driver {
        let mut driver = Driver::new();
        let (half, offered) = (driver.guest.packed(), Cell::new(0));
        driver.packed = Some(Packed { driver: half, event_idx, offered, back: RefCell::default() });
        driver
    }

    fn place(number: u16) -> u64 {
        DATA + 0x100 * u64::from(number)
    }

    pub(super) fn data_of(&self, number: u16) -> u64 {
        self.data + 0x1000 + 0x200 * u64::from(number)
    }

    /// Make request `number` available. The device must be told afterwards, with [`Driver::notify`].
    pub(super) fn offer(&self, number: u16, io: Io) {
        assert!(number < REQUESTS);
        let (at, data) = (Driver::place(number), self.data_of(number));
        let (kind, sector) = match io {
            Io::Read(sector) => (READ, sector),
            Io::Write(sector, _) => (WRITE, sector),
            Io::Flush => (FLUSH, 0),
        };
        self.guest.write(at, &kind.to_le_bytes());
        self.guest.write(at + 8, &sector.to_le_bytes());
        self.guest.write(at + 16, &[UNTOUCHED]);
        let mut buffers = vec![readable(at, 16)];
        match io {
            Io::Read(_) => buffers.push(writable(data, 512)),
            Io::Write(_, byte) => {
                self.guest.write(data, &[byte; 512]);
                buffers.push(readable(data, 512));
            }
            Io::Flush => {}
        }
        buffers.push(writable(at + 16, 1));
        let Some(packed) = &self.packed else {
            return self.guest.offer(chain_from(&self.guest, 3 * number, &buffers));
        };
        packed.offered.set(packed.driver.avail_place());
        let elements: Vec<_> = buffers.iter().map(|&(at, len, write)| (at, len, if write { 2 } else { 0 })).collect();
        packed.driver.offer(number, &elements);
    }

    /// Another thread may go on here.
    pub(super) fn pause(&self) {
        self.point.store(true, Ordering::SeqCst);
    }

    /// Tell the device, unless it does not want to be told (virtio 1.3 §2.7.10).
    pub(super) fn notify(&self) {
        self.pause();
        let wanted = match &self.packed {
            None => self.guest.used_flags() & 1 == 0,
            Some(packed) => packed.driver.wants_kick(packed.offered.get(), packed.event_idx),
        };
        if wanted {
            sync::signal(self.kick.as_fd());
        }
    }

    pub(super) fn status(&self, number: u16) -> u8 {
        self.guest.read::<1>(Driver::place(number) + 16)[0]
    }

    /// Looks at the used index, for other threads.
    pub(super) fn watch_used(&self) -> impl Fn() -> u16 + use<> {
        let (memory, at) = (self.guest.memory.clone(), self.guest.addresses().used + 2);
        move || memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Sleep until the device has given back so many chains in all.
    pub(super) fn await_used(&self, count: u16) {
        if let Some(packed) = &self.packed {
            return self.await_used_packed(packed, usize::from(count));
        }
        while self.guest.used_idx() != count {
            self.interrupts.sleep();
        }
    }

    /// As [`Driver::await_used`], counted since they were last taken.
    fn await_used_packed(&self, packed: &Packed, count: usize) {
        loop {
            packed.back.borrow_mut().extend(std::iter::from_fn(|| packed.driver.take_used()).map(|(id, _)| id));
            if packed.back.borrow().len() == count {
                return;
            }
            packed.driver.want_interrupt(packed.event_idx);
            self.pause();
            // What came before the device could see that is there now (virtio 1.3 §2.8.22).
            if packed.driver.shown_place() == packed.driver.used_place() {
                self.interrupts.sleep();
            }
        }
    }

    /// Numbers of the requests given back since the last call, in order.
    pub(super) fn take_used(&self) -> Vec<u16> {
        if let Some(packed) = &self.packed {
            return packed.back.take();
        }
        std::iter::from_fn(|| self.guest.take_used()).map(|(head, _)| u16::try_from(head / 3).unwrap()).collect()
    }

    /// Carry out one request; its status.
    pub(super) fn run(&self, io: Io) -> u8 {
        self.offer(0, io);
        self.notify();
        self.await_used(self.guest.avail_idx());
        assert_eq!(self.take_used(), [0], "each chain comes back once");
        self.status(0)
    }

    /// The byte that fills the sector; `None` where it does not read.
    pub(super) fn read(&self, sector: u64) -> Option<u8> {
        self.guest.write(self.data_of(0), &[UNTOUCHED; 512]);
        if self.run(Io::Read(sector)) != 0 {
            return None;
        }
        let data = self.guest.read::<512>(self.data_of(0));
        assert!(data.iter().all(|byte| *byte == data[0]), "a torn read");
        Some(data[0])
    }

    /// How a worker starts to serve it, from that entry of its ring on.
    pub(super) fn start(&self, next_avail: u16) -> Command {
        Command::Start(Box::new(StartQueue {
            index: 0,
            addresses: self.guest.addresses(),
            size: self.guest.size,
            base: u32::from(next_avail),
            format: RingFormat {
                packed: self.packed.is_some(),
                event_idx: self.packed.as_ref().is_some_and(|packed| packed.event_idx),
            },
            inflight: None,
            kick: QueueKick::Fd(self.kick.try_clone().unwrap()),
            call: Some(self.call.try_clone().unwrap()),
            err: None,
            enabled: true,
        }))
    }
}

/// Start a worker that serves a driver.
pub(super) fn serve(index: usize, port: WorkerPort, settings: Arc<Settings>, driver: &Driver) -> WorkerThread<Command> {
    let worker = spawn(index, port, settings, Arc::new(WorkerStatus::new())).unwrap();
    let (done, _) = channel();
    worker.commands.send(Command::Memory { map: driver.guest.map(), removed: RegionBits::default(), done });
    worker.commands.send(driver.start(0));
    worker
}

/// Stop the queue as for GET_VRING_BASE; its next avail entry. `None` where it is not served.
pub(super) fn drain(worker: &WorkerThread<Command>) -> Option<u16> {
    let (reply, stopped) = channel();
    worker.commands.send(Command::Stop { queue: 0, how: StopHow::Drain, reply });
    stopped.recv().ok().map(|base| u16::try_from(base).unwrap())
}

/// A device whose driver can flush.
pub(super) fn negotiate(device: &BlkDevice) -> Arc<Settings> {
    device.negotiated(device.offered_features());
    device.settings()
}
