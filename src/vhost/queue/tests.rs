use super::*;
use crate::vhost::testing::packed::PackedDriver;
use crate::vhost::testing::{DATA, Guest, chain_from, kill, readable};

const SIZE: u16 = 8;

/// A guest whose queue outlives those who serve it.
struct Bench {
    guest: Guest,
    driver: PackedDriver,
    packed: bool,
    region: Arc<InflightRegion>,
    map: Arc<MemoryMap>,
}

impl Bench {
    fn new(packed: bool) -> Bench {
        let guest = Guest::new(SIZE);
        let (file, len) = InflightRegion::create(1, SIZE, packed).unwrap();
        let region = Arc::new(InflightRegion::map(&file, 0, len, 1, SIZE).unwrap());
        let driver = guest.packed();
        if packed {
            driver.restart();
        }
        Bench { map: guest.map(), guest, driver, packed, region }
    }

    /// Make buffer `number` available: two descriptors, so that every fourth one begins a lap. Its first byte is in
    /// the place that its number says.
    fn offer(&self, number: u16) {
        let id = number % 4;
        let buffers = [(DATA + u64::from(number), 1, 0), (DATA, 1, 0)];
        if self.packed {
            self.driver.offer(id, &buffers);
        } else {
            self.guest.offer(chain_from(&self.guest, 2 * id, &buffers.map(|(at, len, _)| readable(at, len))));
        }
    }

    /// Ids of the buffers given back, in order.
    fn take_used(&self) -> Vec<u16> {
        std::iter::from_fn(|| match self.packed {
            true => self.driver.take_used().map(|(id, _)| id),
            false => self.guest.take_used().map(|(head, _)| u16::try_from(head / 2).unwrap()),
        })
        .collect()
    }

    fn start(&self) -> Queue {
        let start = StartQueue {
            index: 0,
            addresses: self.guest.addresses(),
            size: SIZE,
            // What a front-end knows after a kill: where the first process began.
            base: if self.packed { 0x8000_8000 } else { 0 },
            format: RingFormat { packed: self.packed, event_idx: false },
            inflight: Some(self.region.clone()),
            kick: Kick::Caller,
            call: None,
            err: None,
            enabled: true,
        };
        Queue::start(&self.map, start).unwrap()
    }

    /// The number of a chain, by its first byte.
    fn number(&self, queue: &Queue, head: Head) -> u16 {
        let mut scatter = Scatter::default();
        queue.walk(&mut scatter, &self.map, head).unwrap();
        let mut byte = [0];
        assert!(queue.walk(&mut scatter, &self.map, head).unwrap().read_at(0, &mut byte));
        byte[0].into()
    }

    /// Take and give back whatever there is; the numbers of it, in order.
    fn serve_all(&self, queue: &mut Queue) -> Vec<u16> {
        let mut served = Vec::new();
        while let Some(head) = queue.resubmit.pop_front() {
            assert!(queue.take_again(head));
            served.push(self.number(queue, head));
            queue.give_back(head, 0);
        }
        while queue.available() > 0
            && let Some((head, _)) = queue.take()
        {
            served.push(self.number(queue, head));
            queue.give_back(head, 0);
        }
        queue.publish();
        served
    }
}

/// What a process does with the four buffers from `first` on, which are there: it gives them back in an order of its
/// own, one of them together with the next.
fn serve_four(bench: &Bench, queue: &mut Queue) {
    let take = |queue: &mut Queue| {
        assert!(queue.available() > 0);
        queue.take().unwrap()
    };
    let (a, _) = take(queue);
    let (b, _) = take(queue);
    let (c, _) = take(queue);
    queue.give_back(b, 0);
    queue.publish();
    queue.give_back(c, 0);
    // Taken while a batch is open, and given up again while another is.
    let (d, place) = take(queue);
    queue.give_back(a, 0);
    queue.forget(d);
    queue.ring.set_next_avail(place);
    queue.publish();
    let (d, _) = take(queue);
    assert_eq!(bench.number(queue, d) % 4, 3);
    queue.give_back(d, 0);
    queue.publish();
}

/// Another does so all at once: the next used place is then the same again, but for its wrap counter.
fn serve_four_at_once(_bench: &Bench, queue: &mut Queue) {
    let taken: Vec<Head> = (0..4).map(|_| queue.take().unwrap().0).collect();
    for head in taken.into_iter().rev() {
        queue.give_back(head, 0);
    }
    queue.publish();
}

/// Every buffer comes back once, wherever a process is killed, and what was under way is resubmitted in order.
fn check_kills(packed: bool) {
    check_kills_of(packed, serve_four);
    check_kills_of(packed, serve_four_at_once);
}

fn check_kills_of(packed: bool, serve: fn(&Bench, &mut Queue)) {
    // In the first lap, over its end, and with both wrap counters turned.
    for laps in 0..3 {
        let mut accesses = 0;
        loop {
            let bench = Bench::new(packed);
            (0..16).for_each(|number| bench.guest.write(DATA + u64::from(number), &[number]));
            let mut number = 0;
            // An odd lap of three buffers moves the place on.
            for _ in 0..laps {
                let mut queue = bench.start();
                let offered: Vec<u16> = (number..number + 3).collect();
                offered.iter().for_each(|number| bench.offer(*number));
                assert_eq!(bench.serve_all(&mut queue), offered);
                assert_eq!(bench.take_used(), offered.iter().map(|number| number % 4).collect::<Vec<_>>());
                number += 3;
            }
            let first = number.next_multiple_of(4);
            for number in number..first {
                bench.offer(number);
                assert_eq!(bench.serve_all(&mut bench.start()), [number]);
                assert_eq!(bench.take_used(), [number % 4]);
            }
            let offered: Vec<u16> = (first..first + 4).collect();
            offered.iter().for_each(|number| bench.offer(*number));
            let ended = kill::after(accesses, || serve(&bench, &mut bench.start()));
            let mut used = bench.take_used();
            let what = format!("packed {packed}, {laps} laps, {accesses} accesses, {used:?} used before");
            let mut queue = bench.start();
            let served = bench.serve_all(&mut queue);
            assert!(served.is_sorted(), "{what}: {served:?}");
            assert!(served.iter().all(|number| !used.contains(&(number % 4))), "{what}: repeated {served:?}");
            used.extend(bench.take_used());
            used.sort_unstable();
            assert_eq!(used, [0, 1, 2, 3], "{what}, then {served:?}");
            assert_eq!(queue.ring.ahead_of(queue.ring.next_avail()), 0);
            // And the queue goes on.
            bench.offer(first + 4);
            assert_eq!(bench.serve_all(&mut queue), [first + 4], "{what}");
            assert_eq!(bench.take_used(), [0], "{what}");
            if ended {
                break;
            }
            accesses += 1;
        }
        assert!(accesses > 40, "a process has many places to be killed at");
    }
}

#[test]
fn a_kill_at_any_access_to_a_split_ring_loses_and_repeats_nothing() {
    check_kills(false);
}

#[test]
fn a_kill_at_any_access_to_a_packed_ring_loses_and_repeats_nothing() {
    check_kills(true);
}

/// A process dies when it has answered several requests of a packed ring and shown none: the next one answers them in
/// another order, and no driver sees what the first one wrote.
#[test]
fn answers_that_a_dead_process_had_not_shown_are_not_seen() {
    // Also over the end of the ring.
    for laps in 0..4_u16 {
        let bench = Bench::new(true);
        for _ in 0..laps {
            (0..3).for_each(|number| bench.offer(number));
            bench.serve_all(&mut bench.start());
            assert_eq!(bench.take_used(), [0, 1, 2]);
        }
        (0..4).for_each(|number| bench.offer(number));
        let mut queue = bench.start();
        let heads: Vec<Head> = (0..4).map(|_| queue.take().unwrap().0).collect();
        heads.into_iter().for_each(|head| queue.give_back(head, 0));
        drop(queue);
        assert!(bench.take_used().is_empty(), "nothing was shown");
        let mut queue = bench.start();
        let heads: Vec<Head> = std::mem::take(&mut queue.resubmit).into();
        assert!(heads.iter().all(|head| queue.take_again(*head)));
        for head in heads.into_iter().rev() {
            queue.give_back(head, 0);
            queue.publish();
            assert_eq!(bench.take_used(), [head.id], "{laps} laps");
        }
    }
}

/// The same with the next process killed, too, while it finds out what there is.
#[test]
fn a_kill_during_recovery_loses_and_repeats_nothing() {
    let bench = Bench::new(true);
    for first in 0.. {
        let mut ended = false;
        for second in 0.. {
            bench.driver.restart();
            bench.region.forget_packed();
            (0..4_u8).for_each(|number| bench.guest.write(DATA + u64::from(number), &[number]));
            (0..4_u16).for_each(|number| bench.offer(number));
            ended = kill::after(first, || serve_four(&bench, &mut bench.start()));
            let recovered = kill::after(second, || drop(bench.start()));
            let mut used = bench.take_used();
            let served = bench.serve_all(&mut bench.start());
            assert!(served.iter().all(|number| !used.contains(number)), "killed at {first} and {second}");
            used.extend(bench.take_used());
            used.sort_unstable();
            assert_eq!(used, [0, 1, 2, 3], "killed at {first} and {second}");
            if recovered {
                break;
            }
        }
        if ended {
            return;
        }
    }
}

#[test]
fn buffer_ids_are_any_number_and_each_is_held_once() {
    let bench = Bench::new(true);
    let mut queue = bench.start();
    bench.driver.offer(0xffff, &[(DATA, 1, 0)]);
    bench.driver.offer(0x8000, &[(DATA, 1, 0)]);
    bench.driver.offer(0xffff, &[(DATA, 1, 0)]);
    let (first, _) = queue.take().unwrap();
    assert_eq!(queue.take().unwrap().0.id, 0x8000);
    assert_eq!((queue.take(), queue.is_running()), (None, false), "the device holds it");
    queue.give_back(first, 0);
    queue.publish();
    assert_eq!(bench.driver.take_used(), Some((0xffff, 0)));
}
