use super::*;
use crate::vhost::testing::packed::PackedDriver;
use crate::vhost::testing::{DATA, Guest};

const SIZE: u16 = 8;
const START: u32 = 0x8000_8000;

/// A guest's ring, and the region that outlives the processes that serve it.
struct Bench {
    guest: Guest,
    driver: PackedDriver,
    region: Arc<InflightRegion>,
}

impl Bench {
    fn new() -> Bench {
        let guest = Guest::new(SIZE);
        let (file, len) = InflightRegion::create(2, SIZE, true).unwrap();
        let region = Arc::new(InflightRegion::map(&file, 0, len, 2, SIZE).unwrap());
        Bench { driver: guest.packed(), guest, region }
    }

    /// As the next process does; the requests that it finds, and where its ring goes on.
    fn try_open(&self) -> Result<(PackedInflight, Vec<Head>, PackedRing), InflightError> {
        let mut ring = PackedRing::new(&self.guest.map(), self.guest.addresses(), SIZE, START, false).unwrap();
        let (state, heads) = PackedInflight::open(&self.region, 1, SIZE, &mut ring)?;
        Ok((state, heads, ring))
    }

    fn open(&self) -> (PackedInflight, Vec<Head>, PackedRing) {
        self.try_open().unwrap()
    }

    fn state(&self) -> QueueState {
        self.region.state(1, LAYOUT).unwrap()
    }

    /// Offer and take a chain; its head and descriptors.
    fn take(&self, state: &mut PackedInflight, ring: &mut PackedRing, id: u16, len: u16) -> (Head, Vec<Descriptor>) {
        let chain: Vec<_> = (0..len).map(|i| (DATA + u64::from(id * 16 + i), u32::from(i), 0)).collect();
        self.driver.offer(id, &chain);
        let mut list = Vec::new();
        let mut head = ring.pop(&mut list).unwrap().unwrap();
        head.entry = state.begin(&list);
        (head, list)
    }
}

#[test]
fn requests_come_back_in_the_order_they_were_taken_with_their_descriptors() {
    let bench = Bench::new();
    let (mut state, found, mut ring) = bench.open();
    assert_eq!(found, []);
    let taken = [(3, 2), (0, 1), (700, 4)].map(|(id, len)| bench.take(&mut state, &mut ring, id, len));
    // The one in the middle comes back, over the first one's descriptor.
    let (head, _) = taken[1];
    ring.push_used(head, 1);
    state.end(head);
    state.publishing(ring.next_used());
    ring.publish();
    state.published(ring.next_used());
    let (mut state, found, mut again) = bench.open();
    assert_eq!(found, [taken[0].0, taken[2].0]);
    let mut list = Vec::new();
    for (head, descriptors) in [&taken[0], &taken[2]] {
        state.load(*head, &mut list);
        let seen = |list: &[Descriptor]| list.iter().map(|it| (it.addr, it.len, it.flags)).collect::<Vec<_>>();
        assert_eq!(seen(&list), seen(descriptors));
    }
    assert_eq!((again.next_used(), again.next_avail()), (ring.next_used(), ring.next_avail()));
    assert_eq!(bench.driver.take_used(), Some((0, 1)));
    let (last, _) = bench.take(&mut state, &mut again, 1, 2);
    assert_eq!(bench.open().1, [taken[0].0, taken[2].0, last]);
}

#[test]
fn a_driver_that_begins_anew_finds_a_region_that_has_forgotten_it() {
    let bench = Bench::new();
    let (mut state, _, mut ring) = bench.open();
    bench.take(&mut state, &mut ring, 0, 3);
    bench.region.forget_packed();
    bench.driver.restart();
    let (_, found, ring) = bench.open();
    assert_eq!((found, ring.next_avail()), (Vec::new(), Place::START));
}

/// What a process wrote that does not know the layout, or that of another queue, is refused.
#[test]
fn nonsense_in_the_region_is_refused() {
    let check = |what: &str, damage: &dyn Fn(&QueueState)| {
        let bench = Bench::new();
        let (mut state, _, mut ring) = bench.open();
        bench.take(&mut state, &mut ring, 0, 2);
        bench.take(&mut state, &mut ring, 1, 3);
        damage(&bench.state());
        assert!(bench.try_open().is_err(), "{what}");
    };
    let set =
        |offset: usize, value: u16| move |state: &QueueState| state.u16_at(offset).store(value, Ordering::Relaxed);
    check("a version to come", &set(VERSION_AT, 2));
    check("another queue size", &set(DESC_NUM_AT, 16));
    check("a used index beyond the ring", &set(USED_AT + 2, SIZE));
    check("a free list that begins nowhere", &set(OLD_FREE_HEAD_AT, u16::MAX));
    check("a free list with a loop", &set(at(6, NEXT_AT), 5));
    check("a free list that ends early", &set(at(5, NEXT_AT), SIZE));
    check("a free list that runs into a chain", &set(at(7, NEXT_AT), 2));
    check("a chain that runs into the free list", &set(at(3, NEXT_AT), 5));
    check("a chain with a loop", &set(at(0, NEXT_AT), 0));
    check("a chain that leads nowhere", &set(at(0, NEXT_AT), u16::MAX));
    check("a chain of no descriptors", &set(at(0, NUM_AT), 0));
    check("a chain longer than the region", &set(at(2, NUM_AT), u16::MAX));
    check("a chain that nobody holds", &|state| state.u8_at(at(2, INFLIGHT_AT)).store(0, Ordering::Relaxed));
}

#[test]
fn regions_of_other_rings_are_refused() {
    let bench = Bench::new();
    let open = |region: &Arc<InflightRegion>, index, size| {
        let mut ring = PackedRing::new(&bench.guest.map(), bench.guest.addresses(), size, START, false).unwrap();
        PackedInflight::open(region, index, size, &mut ring).is_ok()
    };
    assert!(open(&bench.region, 0, SIZE) && open(&bench.region, 0, SIZE - 3));
    assert!(!open(&bench.region, 0, 2 * SIZE), "a ring larger than its state");
    assert!(!open(&bench.region, 2, SIZE));
    let (file, len) = InflightRegion::create(2, SIZE, false).unwrap();
    let split = Arc::new(InflightRegion::map(&file, 0, len, 2, SIZE).unwrap());
    assert!(!open(&split, 1, SIZE), "too small");
    assert!(InflightRegion::map(&file, 0, len - 1, 2, SIZE).is_err());
}
