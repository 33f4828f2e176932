use super::*;
use crate::engine::message::{FenceId, ToShard};
use crate::engine::view::{Geometry, Mode, PrimaryState, View, Written};
use crate::sync::mpsc::{Receiver, TryRecvError};
use crate::units::{Block, BlockRange};
use crate::vhost::dirty::DirtyLog;
use crate::vhost::inflight::InflightRegion;
use crate::vhost::memory::RegionAddress;
use crate::vhost::testing::{Bench, CAPACITY, DATA, chain_from, readable, writable};
use crate::volume::map::Map;

const FENCED_SECTOR: u64 = 80;
const FREE_SECTOR: u64 = 0;

/// Offer a read of a sector, as chain `number` with buffers of its own.
fn offer_read(bench: &Bench, number: u16, sector: u64, data: u64) {
    let at = DATA + u64::from(number) * 0x1000;
    bench.guest.write(at, &0_u32.to_le_bytes());
    bench.guest.write(at + 8, &sector.to_le_bytes());
    bench.guest.write(at + 16, &[0xee]);
    let buffers = [readable(at, 16), writable(data, 512), writable(at + 16, 1)];
    match &bench.packed {
        None => bench.guest.offer(chain_from(&bench.guest, number * 3, &buffers)),
        Some(driver) => driver.offer(number * 3, &buffers.map(|(at, len, write)| (at, len, if write { 2 } else { 0 }))),
    }
}

/// Workers on a split and on a packed ring.
fn benches() -> impl Iterator<Item = (Bench, &'static str)> {
    [(Bench::new as fn(u16) -> Bench, "split"), (Bench::packed, "packed")]
        .into_iter()
        .map(|(new, kind)| (new(64), kind))
}

/// What GET_VRING_BASE says when so many chains were taken, and so many used.
fn base(bench: &Bench, taken: u32, used: u32) -> u32 {
    if bench.packed.is_some() { 0x8000_8000 | (3 * taken) | ((3 * used) << 16) } else { taken }
}

fn offer(bench: &Bench, number: u16, sector: u64) {
    offer_read(bench, number, sector, DATA + 0x8_0000 + u64::from(number) * 0x1000);
}

fn status(bench: &Bench, number: u16) -> u8 {
    bench.guest.read::<1>(DATA + u64::from(number) * 0x1000 + 16)[0]
}

fn fence(bench: &mut Bench) {
    let range = BlockRange::one(Block(FENCED_SECTOR / 8));
    bench.to_shard.send(ToShard::Fence { fence: FenceId(1), range });
    bench.step();
}

fn lift(bench: &mut Bench) {
    let mode = Mode { poisoned: false, primary: PrimaryState::Up, spare_up: true, read_only: false };
    let geometry = Geometry { capacity: CAPACITY, logical_block: 512, slots_start: 0, slots: 0 };
    let (map, written) = (Map::new(CAPACITY / 8), Arc::new(Written::new(CAPACITY)));
    let view = Arc::new(View { geometry, map, mode, dense: Arc::default(), written });
    bench.to_shard.send(ToShard::Publish { view, lift: vec![FenceId(1)], ack: None });
    bench.step();
}

fn used(bench: &Bench) -> Vec<u32> {
    let next = || match &bench.packed {
        None => bench.guest.take_used().map(|(head, _)| head),
        Some(driver) => driver.take_used().map(|(id, _)| u32::from(id)),
    };
    std::iter::from_fn(next).map(|head| head / 3).collect()
}

fn tracked(bench: &Bench) -> Arc<InflightRegion> {
    let (file, len) = InflightRegion::create(1, 64, bench.packed.is_some()).unwrap();
    Arc::new(InflightRegion::map(&file, 0, len, 1, 64).unwrap())
}

fn waits<T: std::fmt::Debug + PartialEq>(receiver: &Receiver<T>) {
    assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
}

#[test]
fn a_stop_waits_for_the_device_and_shows_the_answers() {
    for (mut bench, kind) in benches() {
        bench.start();
        bench.disks.manual(true);
        offer(&bench, 0, FREE_SECTOR);
        bench.step();
        let stopped = bench.begin_stop(StopHow::Drain);
        offer(&bench, 1, FREE_SECTOR);
        bench.step();
        waits(&stopped);
        assert_eq!(used(&bench), [0_u32; 0], "{kind}");
        bench.disks.complete_all();
        bench.step();
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(base(&bench, 1, 1)), vec![0]), "{kind}");
        assert_eq!((status(&bench, 0), status(&bench, 1)), (0, 0xee), "{kind}");
    }
}

#[test]
fn a_stop_rewinds_the_ring_over_parked_requests() {
    for (mut bench, kind) in benches() {
        bench.start();
        fence(&mut bench);
        bench.disks.manual(true);
        offer(&bench, 0, FREE_SECTOR);
        offer(&bench, 1, FENCED_SECTOR);
        offer(&bench, 2, FENCED_SECTOR);
        bench.step();
        assert_eq!((bench.plane.in_flight(), bench.disks.pending_len()), (3, 1), "{kind}");
        let stopped = bench.begin_stop(StopHow::Drain);
        waits(&stopped);
        bench.disks.complete_all();
        bench.disks.manual(false);
        bench.step();
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(base(&bench, 1, 1)), vec![0]), "{kind}");
        lift(&mut bench);
        assert_eq!(used(&bench), [0_u32; 0], "{kind}: what was given up never lands");
        bench.set_base(base(&bench, 1, 1));
        bench.start();
        bench.step();
        assert_eq!(used(&bench), [1, 2], "{kind}");
    }
}

#[test]
fn without_a_region_a_stop_waits_for_requests_it_cannot_rewind() {
    for (mut bench, kind) in benches() {
        bench.start();
        fence(&mut bench);
        offer(&bench, 0, FENCED_SECTOR);
        offer(&bench, 1, FREE_SECTOR);
        bench.step();
        assert_eq!(used(&bench), [1], "{kind}");
        let stopped = bench.begin_stop(StopHow::Drain);
        waits(&stopped);
        lift(&mut bench);
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(base(&bench, 2, 2)), vec![0]), "{kind}");
    }
}

#[test]
fn with_a_region_they_stay_there_and_are_resubmitted_once() {
    for how in [StopHow::Drain, StopHow::Leave] {
        for (mut bench, kind) in benches() {
            let region = tracked(&bench);
            bench.start_with(Some(region.clone()));
            fence(&mut bench);
            offer(&bench, 0, FENCED_SECTOR);
            offer(&bench, 1, FREE_SECTOR);
            offer(&bench, 2, FENCED_SECTOR);
            bench.step();
            // Request 2 is the newest: a drain rewinds over it.
            let taken = if how == StopHow::Drain { 2 } else { 3 };
            assert_eq!(bench.stop(how), Some(base(&bench, taken, 1)), "{kind}, {how:?}");
            lift(&mut bench);
            assert_eq!(used(&bench), [1], "{kind}, {how:?}");
            // Front-ends differ in what they make of it.
            bench.set_base(if bench.packed.is_some() { 0x8000_8000 } else { 0x1234 });
            bench.start_with(Some(region.clone()));
            bench.step();
            assert_eq!(used(&bench), [0, 2], "{kind}, {how:?}");
            offer(&bench, 3, FREE_SECTOR);
            bench.step();
            assert_eq!(used(&bench), [3], "{kind}, {how:?}");
            assert_eq!(bench.stop(StopHow::Drain), Some(base(&bench, 4, 4)), "{kind}, {how:?}");
        }
    }
}

/// The guest goes on in another process, with its memory, and with the region or without.
#[test]
fn with_a_dirty_log_only_a_region_that_goes_along_keeps_requests() {
    for how in [StopHow::Suspend, StopHow::Drain] {
        for (mut bench, kind) in benches() {
            let region = tracked(&bench);
            bench.start_with(Some(region.clone()));
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096).unwrap();
            bench.plane.set_log(&Some(Arc::new(DirtyLog::map(&file, 0, 4096).unwrap())));
            fence(&mut bench);
            offer(&bench, 0, FENCED_SECTOR);
            offer(&bench, 1, FREE_SECTOR);
            bench.step();
            let stopped = bench.begin_stop(how);
            if how == StopHow::Suspend {
                assert_eq!((stopped.try_recv(), used(&bench)), (Ok(base(&bench, 2, 1)), vec![1]), "{kind}");
                lift(&mut bench);
                bench.start_with(Some(region));
                bench.step();
                assert_eq!(used(&bench), [0], "{kind}");
            } else {
                waits(&stopped);
                lift(&mut bench);
                assert_eq!((stopped.try_recv(), used(&bench)), (Ok(base(&bench, 2, 2)), vec![1, 0]), "{kind}");
            }
        }
    }
}

#[test]
fn a_reset_forgets_what_was_parked() {
    for (mut bench, kind) in benches() {
        let region = tracked(&bench);
        bench.start_with(Some(region.clone()));
        fence(&mut bench);
        offer(&bench, 0, FENCED_SECTOR);
        bench.step();
        assert_eq!(bench.stop(StopHow::Discard), Some(base(&bench, 1, 0)), "{kind}");
        lift(&mut bench);
        bench.guest.restart_at(0);
        if let Some(driver) = &bench.packed {
            driver.restart();
            region.forget_packed();
            bench.set_base(0);
        }
        bench.start_with(Some(region));
        bench.step();
        assert_eq!((used(&bench), status(&bench, 0)), (Vec::new(), 0xee), "{kind}");
    }
}

#[test]
fn memory_goes_when_the_requests_into_it_have_ended() {
    const SECOND: u64 = 0x20_0000;
    let mut bench = Bench::new(64);
    bench.start();
    bench.disks.manual(true);
    offer_read(&bench, 0, FREE_SECTOR, SECOND + 0x1000);
    bench.step();
    let second = RegionAddress { guest: SECOND, user: SECOND, len: SECOND, offset: 0 };
    let (map, gone) = bench.guest.map().without_region(second).unwrap();
    let (done, ended) = channel();
    bench.plane.set_memory(&map, gone, done);
    // Requests elsewhere hold nobody up.
    offer(&bench, 1, FREE_SECTOR);
    bench.step();
    waits(&ended);
    bench.disks.complete(0);
    bench.step();
    assert_eq!((ended.try_recv(), used(&bench), bench.plane.in_flight()), (Ok(()), vec![0], 1));
    bench.disks.manual(false);
    offer_read(&bench, 2, FREE_SECTOR, SECOND + 0x1000);
    bench.step();
    assert_eq!((status(&bench, 0), status(&bench, 2)), (0, 1));
}

#[test]
fn a_ring_without_memory_waits_for_it() {
    for (mut bench, kind) in benches() {
        bench.start();
        let (done, ended) = channel();
        bench.plane.set_memory(&MemoryMap::new(), RegionBits(u64::MAX), done.clone());
        offer(&bench, 0, FREE_SECTOR);
        bench.step();
        assert_eq!((ended.try_recv(), used(&bench)), (Ok(()), Vec::new()), "{kind}");
        bench.plane.set_memory(&bench.guest.map(), RegionBits::default(), done);
        bench.step();
        assert_eq!((used(&bench), status(&bench, 0)), (vec![0], 0), "{kind}");
    }
}

#[test]
fn write_through_follows_the_driver() {
    let bench = Bench::new(4);
    let settings = bench.device.settings();
    assert!(!settings.write_through());
    bench.device.write_config(32, &[0]).unwrap();
    assert!(settings.write_through());
    bench.device.write_config(32, &[1]).unwrap();
    bench.device.negotiated(0);
    assert!(settings.write_through(), "a driver that cannot flush");
}
