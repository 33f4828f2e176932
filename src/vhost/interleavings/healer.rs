//! The healer between workers, an operator and a spare that fails.

use super::explore;
use super::guest::{Driver, Io, REQUESTS, drain, serve};
use super::volume::{BLOCK, FIRST, OTHER, Volume};
use crate::device::DeviceIndex;
use crate::device::memory::Keep;
use crate::engine::healer::{Order, Reply};
use crate::sync::atomic::Ordering::SeqCst;
use crate::sync::mpsc::channel;
use crate::sync::thread;
use crate::vhost::thread::WorkerThread;
use crate::vhost::worker::Command;

/// A driver on a worker of its own.
fn connect(volume: &mut Volume) -> (Driver, WorkerThread<Command>) {
    let driver = Driver::new();
    let worker = serve(0, volume.ports.remove(0), volume.settings.clone(), &driver);
    (driver, worker)
}

#[test]
fn no_worker_uses_an_old_map_after_a_fence() {
    explore(100, || {
        let mut volume = Volume::open(2);
        let (mut writers, mut workers) = (Vec::new(), Vec::new());
        for sector in [FIRST, FIRST + 1] {
            let (driver, worker) = connect(&mut volume);
            workers.push(worker);
            writers.push(thread::spawn(move || {
                for round in 1..=3 {
                    assert_eq!(driver.run(Io::Write(sector, round)), 0);
                    assert_eq!(driver.read(sector), Some(round), "not the last write");
                }
            }));
        }
        volume.done(Order::Remap(BLOCK));
        let slot = volume.slot().unwrap();
        volume.done(Order::Release(BLOCK));
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(volume.slot(), None);
        let mut on_primary = [0; 1024];
        volume.disks.peek(DeviceIndex::PRIMARY, BLOCK.start.bytes(), &mut on_primary);
        assert_eq!(on_primary, [3; 1024], "the last writes went elsewhere, perhaps to {slot:?}");
        drop(workers);
    });
}

#[test]
fn a_flush_covers_what_another_queue_was_told_is_written() {
    explore(100, || {
        let mut volume = Volume::open(2);
        let (driver, first) = connect(&mut volume);
        let (flusher, second) = connect(&mut volume);
        volume.done(Order::Remap(BLOCK));
        let slot = volume.opened.geometry.slot_offset(volume.slot().unwrap());
        let (written, hear) = channel();
        let writer = thread::spawn(move || {
            for round in 1..=2 {
                assert_eq!(driver.run(Io::Write(FIRST, round)), 0);
                assert_eq!(driver.run(Io::Write(OTHER.start.0, round)), 0);
                written.send(round).unwrap();
            }
        });
        let disks = volume.disks.clone();
        let flushing = thread::spawn(move || {
            while let Ok(round) = hear.recv() {
                assert_eq!(flusher.run(Io::Flush), 0);
                let lost_power = disks.fork();
                lost_power.crash(|_, _| Keep::Drop);
                let (mut moved, mut plain) = ([0], [0]);
                lost_power.peek(DeviceIndex::SPARE, slot, &mut moved);
                lost_power.peek(DeviceIndex::PRIMARY, OTHER.start.bytes(), &mut plain);
                assert!(moved[0] >= round && plain[0] >= round, "of round {round} there is {moved:?} {plain:?}");
            }
        });
        // Flushes of the healer's own come in between.
        volume.done(Order::Save);
        writer.join().unwrap();
        flushing.join().unwrap();
        drop((first, second));
    });
}

#[test]
fn a_write_that_a_failed_flush_may_have_lost_is_not_answered_as_done() {
    explore(200, || {
        let mut volume = Volume::open(1);
        let (driver, worker) = connect(&mut volume);
        volume.done(Order::Remap(BLOCK));
        let writer = thread::spawn(move || driver.run(Io::Write(FIRST, 1)));
        volume.failure.armed.store(true, SeqCst);
        // Its commit flushes the spare.
        let _ = volume.ask(Order::Remap(OTHER)).recv().unwrap();
        let status = writer.join().unwrap();
        let (poisoned, down) = (volume.status().mode.poisoned, volume.status().spare_down.is_some());
        assert!(poisoned || down, "the flush has failed");
        assert!(status != 0 || poisoned, "answered as written, and nobody says that it may be lost");
        drop(worker);
    });
}

/// What a guest asks for without waiting: of the healer's work, too.
fn ask(driver: Driver) -> thread::JoinHandle<Driver> {
    thread::spawn(move || {
        let ios = [Io::Write(FIRST, 1), Io::Flush, Io::Write(OTHER.start.0, 2), Io::Flush, Io::Write(FIRST, 3)];
        for (number, io) in (0..REQUESTS).zip(ios) {
            driver.offer(number, io);
            driver.notify();
        }
        driver
    })
}

#[test]
fn a_drain_gets_its_requests_back_from_the_healer() {
    explore(100, || {
        let mut volume = Volume::open(1);
        let (driver, worker) = connect(&mut volume);
        let remap = volume.ask(Order::Remap(BLOCK));
        let asking = ask(driver);
        let base = drain(&worker).unwrap();
        let driver = asking.join().unwrap();
        assert_eq!(driver.take_used().len(), usize::from(base), "what was taken has been answered");
        worker.commands.send(driver.start(base));
        driver.await_used(REQUESTS);
        (0..REQUESTS).for_each(|number| assert_eq!(driver.status(number), 0));
        assert!(matches!(remap.recv().unwrap(), Reply::Done(Ok(_))));
        drop(worker);
    });
}

#[test]
fn a_volume_closes_cleanly_while_requests_and_orders_are_under_way() {
    explore(100, || {
        let mut volume = Volume::open(1);
        let (driver, worker) = connect(&mut volume);
        volume.done(Order::Remap(BLOCK));
        let asking = ask(driver);
        // With no worker left to wait for it may stand still, and is given up.
        let _ = volume.ask(Order::Release(BLOCK));
        drop(worker);
        let driver = asking.join().unwrap();
        let answered = driver.take_used();
        answered.iter().for_each(|number| assert_eq!(driver.status(*number), 0));
        let disks = volume.disks.clone();
        volume.close();
        // Everything is durable, and the next start finds nothing changed.
        disks.crash(|_, _| Keep::Drop);
        let mut volume = Volume::open_on(disks, 1);
        let (driver, worker) = connect(&mut volume);
        let found = driver.read(FIRST).unwrap();
        // The two writes to it were not ordered.
        let possible: &[u8] = if answered.iter().any(|number| [0, 4].contains(number)) { &[1, 3] } else { &[0, 1, 3] };
        assert!(possible.contains(&found), "{found} of {possible:?}");
        drop(worker);
    });
}
