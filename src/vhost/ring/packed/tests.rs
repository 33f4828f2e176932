use super::*;
use crate::vhost::testing::packed::PackedDriver;
use crate::vhost::testing::{DATA, Guest};

/// Wrap counters at their start, in both places.
const START: u32 = 0x8000_8000;

/// An interpreter takes its time.
const LAPS: u32 = if cfg!(miri) { 4 } else { 40 };

struct Bench {
    guest: Guest,
    driver: PackedDriver,
    ring: PackedRing,
    list: Vec<Descriptor>,
}

impl Bench {
    fn new(size: u16, event_idx: bool) -> Bench {
        let guest = Guest::new(size);
        let ring = PackedRing::new(&guest.map(), guest.addresses(), size, START, event_idx).unwrap();
        Bench { driver: guest.packed(), guest, ring, list: Vec::new() }
    }

    fn offer(&self, id: u16, len: usize) {
        self.driver.offer(id, &vec![(DATA, 16, 0); len]);
    }

    fn pop(&mut self) -> Result<Option<Head>, RingError> {
        self.ring.pop(&mut self.list)
    }

    fn take(&mut self) -> Head {
        self.pop().unwrap().unwrap()
    }
}

#[test]
fn chains_come_in_order_and_go_back_in_any_with_their_length() {
    for size in [4, 5, 7] {
        let mut bench = Bench::new(size, false);
        for round in 0..LAPS {
            assert_eq!(bench.pop(), Ok(None));
            bench.offer(900, 1);
            bench.offer(7, 3);
            let (a, b) = (bench.take(), bench.take());
            assert_eq!((a, b), (Head { id: 900, len: 1, entry: 0 }, Head { id: 7, len: 3, entry: 0 }));
            assert_eq!((bench.list.len(), bench.pop()), (3, Ok(None)));
            bench.ring.push_used(b, round);
            bench.ring.push_used(a, 0);
            assert_eq!((bench.driver.take(), bench.ring.unpublished()), (None, true));
            assert!(bench.ring.publish());
            assert_eq!(bench.driver.shown_place(), bench.driver.avail_place());
            let wrote = if round > 0 { F_WRITE } else { 0 };
            assert_eq!(bench.driver.take(), Some((7, round, wrote)), "size {size}, round {round}");
            assert_eq!((bench.driver.take(), bench.driver.take()), (Some((900, 0, 0)), None));
            assert_eq!((bench.ring.base(), bench.ring.unpublished()), (bench.driver.base(), false));
        }
    }
}

/// The device's memory of a chain is what it read when it took it.
#[test]
fn used_descriptors_are_written_over_chains_that_the_device_holds() {
    let mut bench = Bench::new(4, false);
    bench.offer(0, 3);
    bench.offer(1, 1);
    let (first, second) = (bench.take(), bench.take());
    bench.ring.push_used(second, 5);
    bench.ring.publish();
    assert_eq!(bench.driver.take(), Some((1, 5, F_WRITE)));
    bench.offer(1, 1);
    assert_eq!(bench.take().id, 1);
    assert_eq!(bench.pop(), Ok(None));
    bench.ring.push_used(first, 6);
    bench.ring.publish();
    assert_eq!(bench.driver.take(), Some((0, 6, F_WRITE)));
}

#[test]
fn a_driver_that_offers_what_the_device_holds_is_refused() {
    let mut bench = Bench::new(4, false);
    bench.offer(0, 4);
    bench.take();
    assert_eq!(bench.pop(), Ok(None));
    bench.driver.descriptor(0, (DATA, 16, F_USED), 1);
    assert_eq!(bench.pop(), Err(RingError::Held(0)));
}

#[test]
fn a_chain_without_end_is_refused() {
    let mut bench = Bench::new(4, false);
    bench.offer(0, 1);
    bench.take();
    for index in 0..4 {
        bench.driver.descriptor(index, (DATA, 16, F_NEXT | F_AVAIL), 1);
    }
    let before = bench.ring.next_avail();
    assert_eq!(bench.pop(), Err(RingError::Endless { first: 1, room: 3 }));
    assert_eq!(bench.ring.next_avail(), before);
}

#[test]
fn only_the_flags_of_the_lap_make_a_descriptor_available() {
    let mut bench = Bench::new(2, false);
    for flags in [0, F_USED, F_AVAIL | F_USED] {
        bench.driver.descriptor(0, (DATA, 16, flags), 1);
        assert_eq!(bench.pop(), Ok(None), "{flags:x}");
    }
    bench.offer(0, 2);
    let head = bench.take();
    bench.ring.push_used(head, 0);
    bench.ring.publish();
    for flags in [0, F_AVAIL, F_AVAIL | F_USED] {
        bench.driver.descriptor(0, (DATA, 16, flags), 1);
        assert_eq!(bench.pop(), Ok(None), "{flags:x}");
    }
    bench.driver.descriptor(0, (DATA, 16, F_USED), 1);
    assert_eq!(bench.take().id, 1);
}

#[test]
fn flags_suppress_notifications_and_kicks() {
    let mut bench = Bench::new(4, false);
    let mut publish = |flags| {
        bench.driver.set_driver_event(0, flags);
        bench.offer(0, 1);
        let head = bench.take();
        bench.ring.push_used(head, 0);
        let notify = bench.ring.publish();
        bench.driver.take().unwrap();
        notify
    };
    // Without EVENT_IDX a place means nothing.
    assert_eq!([EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC, 3].map(&mut publish), [true, false, true, true]);
    bench.ring.disarm();
    assert_eq!(bench.driver.device_event().1, EVENT_DISABLE);
    assert!(!bench.ring.arm());
    assert_eq!(bench.driver.device_event().1, EVENT_ENABLE);
    bench.offer(0, 1);
    assert!(bench.ring.arm(), "what came before arming must be seen");
}

#[test]
fn event_places_suppress_notifications_and_kicks() {
    for size in [4, 5] {
        let mut bench = Bench::new(size, true);
        for round in 0..LAPS {
            // Chains of three descriptors pass the place that the first, the second or the third of them has.
            for ahead in 0..5 {
                let place = bench.ring.next_used().plus(ahead.min(size), size);
                bench.driver.set_driver_event(place.bits(), EVENT_DESC);
                bench.offer(0, 3);
                let head = bench.take();
                bench.ring.push_used(head, 0);
                assert_eq!(bench.ring.publish(), ahead < 3, "size {size}, round {round}, {ahead} ahead");
                bench.driver.take().unwrap();
            }
            // The same index with the other counter is a lap away.
            let place = bench.ring.next_used().plus(size, size);
            bench.driver.set_driver_event(place.bits(), EVENT_DESC);
            bench.offer(0, 1);
            let head = bench.take();
            bench.ring.push_used(head, 0);
            assert!(!bench.ring.publish());
            bench.driver.take().unwrap();
            bench.ring.disarm();
            assert!(!bench.ring.arm());
            assert_eq!(bench.driver.device_event(), (bench.driver.avail_place(), EVENT_DESC));
            // The driver kicks for the chain that begins there, and for no other.
            for (id, wanted) in [(0, true), (1, false)] {
                let before = bench.driver.avail_place();
                bench.offer(id, 2);
                assert_eq!(bench.driver.wants_kick(before, true), wanted);
            }
            bench.driver.want_interrupt(true);
            for notified in [true, false] {
                let head = bench.take();
                bench.ring.push_used(head, 0);
                assert_eq!(bench.ring.publish(), notified);
                bench.driver.take().unwrap();
            }
        }
        for bits in [0x7fff, 0xffff] {
            bench.driver.set_driver_event(bits, EVENT_DESC);
            bench.offer(0, 1);
            let head = bench.take();
            bench.ring.push_used(head, 0);
            bench.ring.publish();
            bench.driver.take().unwrap();
        }
    }
}

#[test]
fn a_ring_goes_on_at_its_base() {
    let mut bench = Bench::new(5, false);
    let again = |bench: &Bench, base| {
        let ring = PackedRing::new(&bench.guest.map(), bench.guest.addresses(), 5, base, false);
        ring.map(|ring| (ring.next_avail().bits(), ring.next_used().bits()))
    };
    assert_eq!(again(&bench, 0), Ok((0x8000, 0x8000)), "a base of 0 for a new ring");
    for lap in [0x8000, 0] {
        bench.offer(0, 3);
        bench.offer(1, 2);
        assert_eq!(again(&bench, lap << 16 | lap), Ok((u16::try_from(lap).unwrap(), u16::try_from(lap).unwrap())));
        let (a, b) = (bench.take(), bench.take());
        let base = bench.ring.base();
        assert_eq!(again(&bench, base), Ok((bench.driver.avail_place(), u16::try_from(lap).unwrap())));
        bench.ring.push_used(b, 0);
        bench.ring.push_used(a, 0);
        bench.ring.publish();
        bench.driver.take();
        bench.driver.take();
        assert_eq!(again(&bench, bench.ring.base()).unwrap().0, bench.driver.avail_place());
    }
    // Indices beyond the ring, more held than it has, and less than nothing.
    for base in [0x8000_8005, 0x8005_8000, 0x8000_0001, 0x8002_8001] {
        assert_eq!(again(&bench, base), Err(RingError::Base { base, size: 5 }), "{base:x}");
    }
}

/// Its first descriptor is as the driver made it available: the chain there ended before a longer one that began on
/// the lap before, whose place it took.
#[test]
fn a_ring_that_has_gone_round_is_not_taken_for_a_new_one() {
    let mut bench = Bench::new(5, false);
    let serve = |bench: &mut Bench, lens: &[usize]| {
        lens.iter().enumerate().for_each(|(id, len)| bench.offer(u16::try_from(id).unwrap(), *len));
        let heads: Vec<_> = lens.iter().map(|_| bench.take()).collect();
        heads.into_iter().rev().for_each(|head| bench.ring.push_used(head, 0));
        bench.ring.publish();
        lens.iter().for_each(|_| assert!(bench.driver.take().is_some()));
    };
    for lens in [&[5][..], &[3], &[2, 1], &[4]] {
        serve(&mut bench, lens);
    }
    assert_eq!((bench.ring.base(), bench.driver.avail_place()), (0, 0));
    assert_eq!(bench.ring.flags(0) & (F_AVAIL | F_USED), F_AVAIL, "as the driver left it");
    let ring = PackedRing::new(&bench.guest.map(), bench.guest.addresses(), 5, 0, false).unwrap();
    assert_eq!((ring.next_avail().bits(), ring.next_used().bits()), (0, 0));
}

/// Not under an interpreter, which maps no files.
#[cfg(not(miri))]
#[test]
fn what_is_written_to_a_ring_is_in_the_dirty_log() {
    use std::os::unix::fs::FileExt;

    const PAGES: u16 = 2;
    let mut bench = Bench::new(PAGES * 256, false);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64).unwrap();
    let log = DirtyLog::map(&file, 0, 64).unwrap();
    let take_dirty = || {
        let mut bits = [0; 64];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&[0; 64], 0).unwrap();
        (0..512).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect::<Vec<_>>()
    };
    let addresses = RingAddresses { log: Some(0x10_0000), ..bench.guest.addresses() };
    bench.ring.remap(&bench.guest.map(), addresses).unwrap();
    bench.ring.arm();
    bench.ring.mark_used(&log, bench.ring.published());
    assert_eq!(take_dirty(), [0x100], "the word that asks for kicks");
    let mut publish = |first: usize, second: usize| {
        let before = bench.ring.published();
        for (id, len) in [(0, first), (1, second)] {
            bench.offer(id, len);
            let head = bench.take();
            bench.ring.push_used(head, 0);
        }
        bench.ring.publish();
        while bench.driver.take().is_some() {}
        bench.ring.mark_used(&log, before);
        take_dirty()
    };
    assert_eq!(publish(100, 100), [0, 0x100]);
    assert_eq!(publish(40, 40), [0, 1, 0x100]);
    assert_eq!(publish(100, 100), [1, 0x100]);
    assert_eq!(publish(30, 10), [0, 1, 0x100], "over the end of the ring");
}

#[test]
fn rings_outside_of_memory_or_misaligned_are_refused() {
    let guest = Guest::new(4);
    let good = guest.addresses();
    let new = |addresses, size| PackedRing::new(&guest.map(), addresses, size, START, false).map(|_| ());
    for size in [1, 3, 4, 32_768] {
        assert_eq!(new(good, size), Ok(()));
    }
    assert_eq!(new(good, 0), Err(RingError::Size(0)));
    assert_eq!(new(good, 32_769), Err(RingError::Size(32_769)));
    let descriptors = good.descriptors + 8;
    assert!(matches!(new(RingAddresses { descriptors, ..good }, 4), Err(RingError::Misaligned(..))));
    let (used, avail) = (good.used + 2, good.avail + 2);
    assert!(matches!(new(RingAddresses { used, ..good }, 4), Err(RingError::Misaligned(..))));
    assert!(matches!(new(RingAddresses { avail, ..good }, 4), Err(RingError::Misaligned(..))));
    for descriptors in [guest.first_region_end() - 48, 1 << 40, u64::MAX - 15] {
        assert!(matches!(new(RingAddresses { descriptors, ..good }, 4), Err(RingError::NotMapped(..))));
    }
}
