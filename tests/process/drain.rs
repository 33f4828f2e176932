//! Orders of a front-end that wait for the disk (O5), while the disk is slow.

use std::time::Duration;

use crate::frontend::{FrontEnd, MEMORY_END, NEXT, PAGE, Setup, WRITE};
use crate::guest::ANSWER_LIMIT;
use crate::model::pattern;
use crate::server::{Server, Volume};

const SETUP: Setup = Setup { queues: 1, size: 16, without: 0 };
/// In the region that the front-end takes back.
const DATA: u64 = MEMORY_END - 8 * PAGE;
const SLOW_SECTOR: u64 = 800;
const FAST_SECTOR: u64 = 80;

/// Offer a request on 8 sectors as chain `number`, each with its own data.
fn offer(front_end: &mut FrontEnd, number: u16, kind: u32, sector: u64) {
    let ring = &mut front_end.rings[0];
    let header = ring.area() + u64::from(number) * PAGE;
    let first = number * 3;
    let data = DATA + u64::from(number) * PAGE;
    ring.write(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    ring.descriptor(first, (header, 16, NEXT, first + 1));
    ring.descriptor(first + 1, (data, 4096, if kind == 0 { NEXT | WRITE } else { NEXT }, first + 2));
    ring.descriptor(first + 2, (header + 16, 1, WRITE, 0));
    ring.offer(first);
}

fn data(front_end: &FrontEnd, number: u16) -> Vec<u8> {
    front_end.rings[0].read(DATA + u64::from(number) * PAGE, 4096)
}

/// A front-end whose read is held by the disk for a second; the operator is answered meanwhile.
fn with_a_slow_read(server: &Server) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    for sector in [SLOW_SECTOR, FAST_SECTOR] {
        front_end.rings[0].write(DATA, &pattern(sector, 8, 1));
        offer(&mut front_end, 0, 1, sector);
        assert_eq!(front_end.rings[0].take(ANSWER_LIMIT), Some((0, 1)));
    }
    front_end.rings[0].write(DATA, &[0xee; 4096]);
    let slow = format!("{SLOW_SECTOR}-{}", SLOW_SECTOR + 7);
    server.fault(&["--ops", "read", "--delay", "1000", "--count", "1", "--sectors", &slow]);
    offer(&mut front_end, 0, 0, SLOW_SECTOR);
    server.await_status(|status| status.oldest_in_flight_ms > 0);
    assert_eq!(front_end.rings[0].used_idx(), 2, "the disk is not slow");
    front_end
}

/// What the front-end asks for; when that is answered the read must have ended.
fn check(order: impl FnOnce(&mut FrontEnd)) -> FrontEnd {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let mut front_end = with_a_slow_read(&server);
    order(&mut front_end);
    assert_eq!(front_end.rings[0].used_idx(), 3, "answered before the device had returned the request");
    assert!(data(&front_end, 0) == pattern(SLOW_SECTOR, 8, 1));
    // From now on the memory is the front-end's.
    front_end.rings[0].write(DATA, &[0xdd; 4096]);
    front_end.stop(0);
    server.order(&["fault", "clear"]);
    server.stop();
    assert!(data(&front_end, 0) == [0xdd; 4096], "written to after it was given back");
    front_end
}

#[test]
fn a_stop_is_answered_when_a_slow_disk_has_returned_the_request() {
    check(|front_end| assert_eq!(front_end.stop(0), 3));
}

#[test]
fn memory_is_given_back_when_a_slow_disk_has_read_into_it() {
    check(FrontEnd::swap_memory);
    check(FrontEnd::replace_memory);
}

#[test]
fn a_reset_is_answered_when_a_slow_disk_has_returned_the_request() {
    check(FrontEnd::reset);
}

/// A front-end that goes leaves its read to the disk; the next one has its queue when that has ended.
#[test]
fn the_next_front_end_is_served_when_a_slow_disk_has_returned_the_last_one_s_request() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&[]);
    let front_end = with_a_slow_read(&server);
    let memory = front_end.memory().clone();
    drop(front_end);
    let mut next = FrontEnd::connect(&server.socket, SETUP);
    let mut buffer = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&*memory, &mut buffer, DATA).unwrap();
    assert!(buffer[..] == pattern(SLOW_SECTOR, 8, 1), "the old read has not ended");
    offer(&mut next, 0, 0, FAST_SECTOR);
    assert!(next.rings[0].take(Duration::from_secs(10)).is_some());
    assert!(data(&next, 0) == pattern(FAST_SECTOR, 8, 1));
}
