//! A worker between a guest that does not stop asking, the protocol thread, and threads that do the I/O.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};

use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags};

use super::guest::{Driver, Io, REQUESTS, UNTOUCHED, drain, event, negotiate, serve};
use super::{explore, last_owner};
use crate::device::open::{DeviceSet, OpenDevice, OpenOptions, open_file};
use crate::device::threads::ThreadReactor;
use crate::runtime::worker::WorkerPort;
use crate::sync::mpsc::channel;
use crate::sync::thread;
use crate::vhost::crew::Crew;
use crate::vhost::device::BlkDevice;
use crate::vhost::memory::RegionBits;
use crate::vhost::session::Session;
use crate::vhost::testing::{Bench, CAPACITY};
use crate::vhost::thread::WorkerThread;
use crate::vhost::worker::{Command, StopHow};

/// What each sector of the disk is filled with.
fn content(sector: u64) -> u8 {
    u8::try_from(sector % 100).unwrap() + 1
}

/// A disk that is only read, whose I/O is done by threads of a pool.
static DISK: LazyLock<Arc<OpenDevice>> = LazyLock::new(|| {
    let file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..CAPACITY {
        file.as_file().write_all_at(&[content(sector); 512], sector * 512).unwrap();
    }
    let options = OpenOptions { direct: false, ..OpenOptions::default() };
    Arc::new(open_file(file.reopen().unwrap(), file.path(), &options).unwrap())
});

fn port() -> (Arc<BlkDevice>, WorkerPort) {
    let (device, mut ports) = Bench::ports(1);
    let mut port = ports.remove(0);
    let disk = DISK.clone();
    port.reactor = Box::new(move || Ok(Box::new(ThreadReactor::new(&DeviceSet::new(vec![disk]), 2)?)));
    (device, port)
}

/// What became of request `number`, a read of the sector of that number.
fn check(driver: &Driver, number: u16) {
    assert_eq!(driver.status(number), 0, "request {number} is served");
    assert_eq!(driver.guest.read::<512>(driver.data_of(number)), [content(number.into()); 512]);
}

/// A guest that reads sectors 0, 1, … without waiting for anything, in another thread.
fn ask(driver: Driver) -> thread::JoinHandle<Driver> {
    thread::spawn(move || {
        for number in 0..REQUESTS {
            driver.offer(number, Io::Read(number.into()));
            driver.notify();
        }
        driver
    })
}

#[test]
fn a_drain_ends_and_nothing_is_taken_after_it() {
    explore(300, || {
        let (device, port) = port();
        let driver = Driver::new();
        let worker = serve(0, port, negotiate(&device), &driver);
        let used_idx = driver.watch_used();
        let asking = ask(driver);
        let base = drain(&worker).unwrap();
        assert_eq!(used_idx(), base, "what was taken has been answered");
        let driver = asking.join().unwrap();
        assert_eq!(drain(&worker), None, "the queue is stopped");
        assert_eq!(used_idx(), base, "nothing is taken after a drain");
        let taken = driver.take_used();
        assert_eq!(taken.len(), usize::from(base));
        taken.into_iter().for_each(|number| check(&driver, number));
        (base..REQUESTS).for_each(|number| assert_eq!(driver.status(number), UNTOUCHED));
        worker.commands.send(driver.start(base));
        driver.await_used(REQUESTS);
        assert_eq!(driver.take_used().len(), usize::from(REQUESTS - base), "each chain comes back once");
        (0..REQUESTS).for_each(|number| check(&driver, number));
    });
}

/// A front-end whose guest has two regions of memory, the rings in the first of them.
fn connect(device: Arc<BlkDevice>, crew: Arc<Crew>, driver: &Driver) -> Session {
    let mut session = Session::new(device, crew, 1);
    let len = driver.guest.first_region_end();
    let region = |start| VhostUserMemoryRegion::new(start, len, start, start);
    let files = [driver.guest.file.try_clone().unwrap(), driver.guest.file.try_clone().unwrap()];
    session.set_mem_table(&[region(0), region(len)], files.into(), None).unwrap();
    session.set_vring_num(0, driver.guest.size.into()).unwrap();
    let ring = driver.guest.addresses();
    let flags = VhostUserVringAddrFlags::empty();
    session.set_vring_addr(0, flags, ring.descriptors, ring.used, ring.avail, 0).unwrap();
    session.set_vring_call(0, Some(driver.call.try_clone().unwrap().into())).unwrap();
    session.set_vring_enable(0, true).unwrap();
    session.set_vring_kick(0, Some(driver.kick.try_clone().unwrap().into())).unwrap();
    session
}

#[test]
fn memory_that_was_given_back_is_used_by_nobody() {
    explore(300, || {
        const CANARY: [u8; 512] = [0xaa; 512];
        let (device, port) = port();
        let mut driver = Driver::new();
        let second = driver.guest.first_region_end();
        driver.data = second;
        negotiate(&device);
        let crew = Arc::new(Crew::new(device.clone(), 1, vec![port], None).unwrap());
        let mut session = connect(device, crew.clone(), &driver);
        let memory: Arc<File> = driver.guest.file.clone();
        let places: Vec<u64> = (0..REQUESTS).map(|number| driver.data_of(number)).collect();
        let asking = ask(driver);
        session.remove_mem_region(&VhostUserSingleMemoryRegion::new(second, second, second, second)).unwrap();
        places.iter().for_each(|place| memory.write_all_at(&CANARY, *place).unwrap());
        let driver = asking.join().unwrap();
        driver.await_used(REQUESTS);
        for place in places {
            let mut found = [0; 512];
            memory.read_exact_at(&mut found, place).unwrap();
            assert_eq!(found, CANARY, "the device wrote to memory after it was given back");
        }
        let base = { session.get_vring_base(0).unwrap().num };
        assert_eq!(base, u32::from(REQUESTS));
        drop((session, crew));
        assert_eq!(driver.take_used().len(), usize::from(REQUESTS));
    });
}

#[test]
fn no_request_is_lost_where_kick_and_memory_change_under_a_live_queue() {
    explore(300, || {
        let (device, port) = port();
        let mut driver = Driver::new();
        negotiate(&device);
        let crew = Arc::new(Crew::new(device.clone(), 1, vec![port], None).unwrap());
        let mut session = connect(device, crew.clone(), &driver);
        let second = driver.guest.first_region_end();
        let file = driver.guest.file.clone();
        for number in [0, 1] {
            driver.offer(number, Io::Read(number.into()));
            driver.notify();
        }
        // What was signalled there and not yet heard must not be lost.
        let kick = event();
        session.set_vring_kick(0, Some(kick.try_clone().unwrap().into())).unwrap();
        driver.kick = kick;
        driver.await_used(2);
        let asking = thread::spawn(move || {
            for number in 2..REQUESTS {
                driver.offer(number, Io::Read(number.into()));
                driver.notify();
            }
            driver.await_used(REQUESTS);
            driver
        });
        // Memory that no request lies in goes and comes back.
        let region = VhostUserSingleMemoryRegion::new(second, second, second, second);
        session.remove_mem_region(&region).unwrap();
        session.add_mem_region(&region, file.try_clone().unwrap(), None).unwrap();
        session.set_vring_enable(0, false).unwrap();
        session.set_vring_enable(0, true).unwrap();
        let driver = asking.join().unwrap();
        assert_eq!(driver.take_used().len(), usize::from(REQUESTS), "each chain comes back once");
        (0..REQUESTS).for_each(|number| check(&driver, number));
        session.close();
        drop((session, crew));
    });
}

/// Wait until the worker has done all that it was told before.
fn settle(worker: &WorkerThread<Command>, driver: &Driver) {
    let (done, heard) = channel();
    worker.commands.send(Command::Memory { map: driver.guest.map(), removed: RegionBits::default(), done });
    heard.recv().unwrap();
}

#[test]
fn a_queue_that_is_to_stop_or_disabled_takes_nothing_more() {
    explore(200, || {
        let (device, port) = port();
        let driver = Driver::new();
        let worker = serve(0, port, negotiate(&device), &driver);
        let used_idx = driver.watch_used();
        let offer = |number: u16| {
            driver.offer(number, Io::Read(number.into()));
            driver.notify();
        };
        offer(0);
        worker.commands.send(Command::Enable { queue: 0, enabled: false });
        settle(&worker, &driver);
        offer(1);
        driver.pause();
        settle(&worker, &driver);
        assert!(used_idx() <= 1, "a request is taken from a disabled queue");
        worker.commands.send(Command::Enable { queue: 0, enabled: true });
        offer(2);
        let (reply, stopped) = channel();
        worker.commands.send(Command::Stop { queue: 0, how: StopHow::Drain, reply });
        settle(&worker, &driver);
        offer(3);
        let base = u16::try_from(stopped.recv().unwrap()).unwrap();
        assert!(base <= 3, "a request is taken after the order to stop");
        assert_eq!(used_idx(), base);
        (0..base).for_each(|number| check(&driver, number));
    });
}

#[test]
fn a_worker_that_is_told_to_end_lets_go_of_everything() {
    explore(300, || {
        let (device, port) = port();
        let driver = Driver::new();
        let worker = serve(0, port, negotiate(&device), &driver);
        let used_idx = driver.watch_used();
        let asking = ask(driver);
        drop(worker);
        let used = used_idx();
        let driver = asking.join().unwrap();
        assert_eq!(used_idx(), used, "nothing is given back by a worker that has ended");
        let given_back = driver.take_used();
        assert_eq!(given_back.len(), usize::from(used));
        for number in 0..REQUESTS {
            if given_back.contains(&number) {
                check(&driver, number);
            } else {
                let data = driver.guest.read::<512>(driver.data_of(number));
                assert_eq!((driver.status(number), data), (UNTOUCHED, [0; 512]), "served, and not given back");
            }
        }
        drop(used_idx);
        assert!(last_owner(&driver.guest.memory), "its memory is held");
    });
}

/// Neither side of a packed ring sleeps while the other has something for it, whoever asks to be told and how.
fn check_packed(event_idx: bool) {
    let (device, port) = port();
    let driver = Driver::packed(event_idx);
    let worker = serve(0, port, negotiate(&device), &driver);
    let asking = ask(driver);
    let driver = asking.join().unwrap();
    driver.await_used(REQUESTS);
    assert_eq!(driver.take_used().len(), usize::from(REQUESTS), "each chain comes back once");
    (0..REQUESTS).for_each(|number| check(&driver, number));
    // One at a time, over the end of the ring.
    for number in [1, 2] {
        driver.offer(number, Io::Read(number.into()));
        driver.notify();
        driver.await_used(1);
        assert_eq!(driver.take_used(), [number]);
    }
    drop(worker);
}

#[test]
fn no_request_of_a_packed_ring_is_lost_between_kick_and_sleep() {
    explore(200, || check_packed(false));
    explore(200, || check_packed(true));
}
