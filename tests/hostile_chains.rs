//! Chains that no honest driver sends (DESIGN E5): each is given back exactly once, with the right used
//! length and status, and the next honest request is served.
//!
//! Where the ring itself lies (an index or head that cannot be), it stops until it is restarted, and the
//! request after the restart is served.

use std::time::{Duration, Instant};

// The bench speaks of `crate::…`, so that the library's own unit tests can use it too.
use vhost_remap::{device, engine, runtime, vhost, volume};

/// What the library's own tests have in its place there.
mod sync {
    pub(crate) use std::sync::{atomic, mpsc};
}

#[expect(dead_code, reason = "the unit tests of the library use the rest")]
#[path = "../src/vhost/testing.rs"]
mod testing;

use testing::{Bench, Buffer, CAPACITY, DATA, chain_from, chain_of, readable, writable};
use vhost::worker::StopHow;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x900;
const BODY: u64 = DATA + 0x1000;
const TABLE: u64 = DATA + 0x2_0000;
const MEMORY_END: u64 = 0x40_0000;
/// What the status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn header(bench: &Bench, kind: u32, sector: u64) {
    bench.guest.write(HEADER, &kind.to_le_bytes());
    bench.guest.write(HEADER + 8, &sector.to_le_bytes());
    bench.guest.write(STATUS, &[UNTOUCHED]);
}

/// Offer a chain of these buffers, which begins with descriptor 0 or has buffer id 0.
fn offer(bench: &Bench, buffers: &[Buffer]) {
    match &bench.packed {
        None => bench.guest.offer(chain_of(&bench.guest, buffers)),
        Some(driver) => {
            let elements: Vec<_> =
                buffers.iter().map(|&(at, len, write)| (at, len, if write { WRITE } else { 0 })).collect();
            driver.offer(0, &elements);
        }
    }
}

/// The next used entry: head or buffer id, and length.
fn take_used(bench: &Bench) -> Option<(u32, u32)> {
    match &bench.packed {
        None => bench.guest.take_used(),
        Some(driver) => driver.take_used().map(|(id, len)| (u32::from(id), len)),
    }
}

/// Offer `head`, and expect one used entry with `len` and that status, then an honest request to work.
fn expect(bench: &mut Bench, name: &str, head: u16, len: u32, status: u8) {
    bench.guest.offer(head);
    expect_used(bench, name, head, len, status);
}

/// As [`expect`], for what was offered.
fn expect_used(bench: &mut Bench, name: &str, head: u16, len: u32, status: u8) {
    let start = Instant::now();
    bench.step();
    assert!(start.elapsed() < Duration::from_secs(5), "{name}: took {:?}", start.elapsed());
    assert_eq!(take_used(bench), Some((u32::from(head), len)), "{name}");
    assert_eq!(take_used(bench), None, "{name}: given back twice");
    assert_eq!(bench.guest.read::<1>(STATUS), [status], "{name}");
    assert_eq!(bench.plane.in_flight(), 0, "{name}");
    honest(bench, name);
}

/// Write a sector and read it back.
fn honest(bench: &mut Bench, name: &str) {
    for (kind, buffer) in [(OUT, readable(BODY, 512)), (IN, writable(BODY + 512, 512))] {
        header(bench, kind, 9);
        bench.guest.write(BODY, &[0x5a; 512]);
        offer(bench, &[readable(HEADER, 16), buffer, writable(STATUS, 1)]);
        bench.step();
        let len = if kind == IN { 513 } else { 1 };
        assert_eq!(take_used(bench), Some((0, len)), "{name}: the honest request after it");
        assert_eq!(bench.guest.read::<1>(STATUS), [OK], "{name}: the honest request after it");
    }
    assert_eq!(bench.guest.read::<512>(BODY + 512), [0x5a; 512], "{name}: the honest request after it");
}

/// A whole chain, its header's type and sector, and what comes of it.
type Case = (&'static str, u32, u64, Vec<Buffer>, u32, u8);

fn check(cases: Vec<Case>) {
    for mut bench in [Bench::new(64), Bench::packed(61)] {
        bench.start();
        for (name, kind, sector, buffers, len, status) in &cases {
            header(&bench, *kind, *sector);
            bench.guest.write(BODY, &[0xff; 16]);
            offer(&bench, buffers);
            expect_used(&mut bench, name, 0, *len, *status);
        }
    }
}

/// A chain of a good header, `rest`, and a good status.
fn framed(rest: &[Buffer]) -> Vec<Buffer> {
    [&[readable(HEADER, 16)], rest, &[writable(STATUS, 1)]].concat()
}

#[test]
fn unusual_framing_is_served() {
    let one_by_one: Vec<_> = (0..16).map(|i| readable(HEADER + i, 1)).collect();
    let split = [one_by_one, vec![writable(BODY, 512), writable(STATUS, 1)]].concat();
    let holes = [writable(BODY, 0), writable(BODY, 512), writable(1 << 60, 0)];
    check(vec![
        ("header in 16 descriptors", IN, 0, split, 513, OK),
        ("header and data in one", OUT, 0, vec![readable(HEADER, 16 + 512), writable(STATUS, 1)], 1, OK),
        ("data and status in one", IN, 0, vec![readable(HEADER, 16), writable(STATUS - 512, 513)], 513, OK),
        ("empty buffers between", IN, 0, framed(&holes), 513, OK),
        ("the same data twice", IN, 0, framed(&[writable(BODY, 512), writable(BODY, 512)]), 1025, OK),
        ("data over the status", IN, 0, framed(&[writable(STATUS - 100, 512)]), 513, OK),
        ("data over the header", IN, 0, framed(&[writable(HEADER, 512)]), 513, OK),
        ("identity into nothing", GET_ID, 0, framed(&[]), 1, OK),
        ("identity into one byte", GET_ID, 0, framed(&[writable(BODY, 1)]), 2, OK),
        ("identity into a page", GET_ID, 0, framed(&[writable(BODY, 4096)]), 21, OK),
        ("flush with data", FLUSH, u64::MAX, framed(&[readable(BODY, 512), writable(BODY, 512)]), 1, OK),
        ("a read of nothing", IN, 0, framed(&[]), 1, OK),
    ]);
}

#[test]
fn chains_without_a_status_come_back_empty() {
    check(vec![
        ("no status", FLUSH, 0, vec![readable(HEADER, 16)], 0, UNTOUCHED),
        ("no writable byte", OUT, 0, vec![readable(HEADER, 16), readable(BODY, 512)], 0, UNTOUCHED),
        ("an empty status", FLUSH, 0, vec![readable(HEADER, 16), writable(STATUS, 0)], 0, UNTOUCHED),
        ("nothing at all", FLUSH, 0, vec![readable(HEADER, 0)], 0, UNTOUCHED),
        ("status outside of memory", FLUSH, 0, vec![readable(HEADER, 16), writable(1 << 40, 1)], 0, UNTOUCHED),
        ("status at the end of memory", FLUSH, 0, vec![readable(HEADER, 16), writable(MEMORY_END, 1)], 0, UNTOUCHED),
        ("readable after writable", OUT, 0, vec![writable(STATUS, 1), readable(HEADER, 16)], 0, UNTOUCHED),
        ("readable between writables", IN, 0, framed(&[writable(BODY, 512), readable(BODY, 1)]), 0, UNTOUCHED),
    ]);
}

#[test]
fn requests_that_cannot_be_served_fail() {
    let overflow = [writable(0, u32::MAX), writable(0, u32::MAX), writable(0, 515)];
    let status = writable(STATUS, 1);
    check(vec![
        ("only a status", FLUSH, 0, vec![status], 1, IOERR),
        ("half a header", FLUSH, 0, vec![readable(HEADER, 15), status], 1, IOERR),
        ("header outside of memory", FLUSH, 0, vec![readable(1 << 40, 16), status], 1, IOERR),
        ("header at the end of addresses", FLUSH, 0, vec![readable(u64::MAX - 7, 16), status], 1, IOERR),
        ("header over the end of memory", FLUSH, 0, vec![readable(MEMORY_END - 8, 16), status], 1, IOERR),
        ("writable header", IN, 0, vec![writable(HEADER, 16), writable(BODY, 512), status], 1, IOERR),
        ("data outside of memory", IN, 0, framed(&[writable(1 << 40, 512)]), 1, IOERR),
        ("data over the end of memory", OUT, 0, framed(&[readable(MEMORY_END - 256, 512)]), 1, IOERR),
        ("4 GiB of data", IN, 0, framed(&[writable(BODY, u32::MAX)]), 1, IOERR),
        ("data of 2^33 + 513 bytes", IN, 0, framed(&overflow), 1, IOERR),
        ("half a sector", IN, 0, framed(&[writable(BODY, 256)]), 1, IOERR),
        ("one byte over", OUT, 0, framed(&[readable(BODY, 513)]), 1, IOERR),
        ("beyond the end", IN, CAPACITY, framed(&[writable(BODY, 512)]), 1, IOERR),
        ("across the end", OUT, CAPACITY - 1, framed(&[readable(BODY, 1024)]), 1, IOERR),
        ("sector times 512 overflows", IN, u64::MAX / 2, framed(&[writable(BODY, 512)]), 1, IOERR),
        ("sector plus count overflows", OUT, u64::MAX, framed(&[readable(BODY, 512)]), 1, IOERR),
        ("unknown type", 0xdead, 0, framed(&[]), 1, UNSUPP),
        ("discard without segments", DISCARD, 0, framed(&[]), 1, IOERR),
        ("zeroing with half a segment", WRITE_ZEROES, 0, framed(&[readable(BODY, 8)]), 1, IOERR),
        ("zeroing with unknown flags", WRITE_ZEROES, 0, framed(&[readable(BODY, 16)]), 1, UNSUPP),
    ]);
}

/// Descriptors as they are written: address, length, flags, next.
type Raw = &'static [(u64, u32, u16, u16)];

#[test]
fn broken_structures_come_back_empty() {
    let mut bench = Bench::new(64);
    bench.start();
    let chains: &[(&str, Raw)] = &[
        ("a loop of one", &[(HEADER, 16, NEXT, 0)]),
        ("a loop of two", &[(HEADER, 16, NEXT, 1), (BODY, 16, NEXT, 0)]),
        ("a loop after the status", &[(HEADER, 16, NEXT, 1), (STATUS, 1, NEXT | WRITE, 1)]),
        ("next outside of the table", &[(HEADER, 16, NEXT, 64)]),
        ("next far outside of the table", &[(HEADER, 16, NEXT, u16::MAX)]),
        ("indirect with next", &[(TABLE, 32, INDIRECT | NEXT, 1), (STATUS, 1, WRITE, 0)]),
        ("indirect of no length", &[(TABLE, 0, INDIRECT, 0)]),
        ("indirect of 17 bytes", &[(TABLE, 17, INDIRECT, 0)]),
        ("indirect of 4 GiB", &[(TABLE, !15, INDIRECT, 0)]),
        ("indirect outside of memory", &[(1 << 40, 32, INDIRECT, 0)]),
        ("indirect over the end of memory", &[(MEMORY_END - 16, 32, INDIRECT, 0)]),
        ("indirect at the end of addresses", &[(u64::MAX - 15, 32, INDIRECT, 0)]),
    ];
    // The one entry of the table at the end of memory leads on to the next.
    bench.guest.indirect(MEMORY_END - 16, &[(HEADER, 16, NEXT, 1)]);
    for (name, chain) in chains {
        header(&bench, FLUSH, 0);
        for (i, &(addr, len, flags, next)) in chain.iter().enumerate() {
            bench.guest.descriptor(u16::try_from(i).unwrap(), addr, len, flags, next);
        }
        expect(&mut bench, name, 0, 0, UNTOUCHED);
    }
    let tables: &[(&str, Raw)] = &[
        ("nested indirect", &[(TABLE, 32, INDIRECT, 0), (STATUS, 1, WRITE, 0)]),
        ("nested indirect at the end", &[(HEADER, 16, NEXT, 1), (TABLE, 32, INDIRECT, 0)]),
        ("a loop in a table", &[(HEADER, 16, NEXT, 1), (HEADER, 16, NEXT, 0)]),
        ("next outside of a table", &[(HEADER, 16, NEXT, 2), (STATUS, 1, WRITE, 0)]),
    ];
    for (name, table) in tables {
        header(&bench, FLUSH, 0);
        bench.guest.indirect(TABLE, table);
        bench.guest.descriptor(0, TABLE, 32, INDIRECT, 0);
        expect(&mut bench, name, 0, 0, UNTOUCHED);
    }
}

#[test]
fn strange_but_legal_tables_are_served() {
    let mut bench = Bench::new(4);
    bench.start();
    header(&bench, FLUSH, 0);
    bench.guest.indirect(TABLE, &[(HEADER, 16, NEXT, 2), (0, 0, INDIRECT, 9), (STATUS, 1, WRITE, 7)]);
    bench.guest.descriptor(0, TABLE, 48, INDIRECT, 0);
    expect(&mut bench, "an entry that is skipped", 0, 1, OK);

    header(&bench, FLUSH, 0);
    bench.guest.indirect(TABLE, &[(STATUS, 1, WRITE, 0)]);
    bench.guest.descriptor(0, HEADER, 16, NEXT, 1);
    bench.guest.descriptor(1, TABLE, 16, INDIRECT | WRITE, 0);
    expect(&mut bench, "a table after a descriptor, marked writable", 0, 1, OK);

    header(&bench, FLUSH, 0);
    bench.guest.indirect(TABLE + 3, &[(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0)]);
    bench.guest.descriptor(0, TABLE + 3, 32, INDIRECT, 0);
    expect(&mut bench, "a table at an odd address", 0, 1, OK);
}

/// A read whose table has a header, `middle` bytes of data `step` apart, and a status.
fn check_long(bench: &mut Bench, name: &str, middle: u16, step: u64, len: u32, status: u8) {
    header(bench, IN, 0);
    let data = |i: u16| (DATA + 0xc_0000 + u64::from(i) * step, 1, NEXT | WRITE, i + 2);
    let mut table = vec![(HEADER, 16, NEXT, 1)];
    table.extend((0..middle).map(data));
    table.push((STATUS, 1, WRITE, 0));
    bench.guest.indirect(TABLE, &table);
    bench.guest.descriptor(0, TABLE, (u32::from(middle) + 2) * 16, INDIRECT, 0);
    expect(bench, name, 0, len, status);
}

#[test]
fn chains_far_longer_than_the_queue() {
    let mut bench = Bench::new(4);
    bench.start();
    check_long(&mut bench, "512 + 3 descriptors, as Windows sends", 513, 1, 1, IOERR);
    check_long(&mut bench, "512 + 2 descriptors", 512, 1, 513, OK);
    check_long(&mut bench, "as many, scattered", 512, 2, 513, OK);
    check_long(&mut bench, "32256 descriptors in a row", 32_256, 1, 32_257, OK);
    check_long(&mut bench, "more scattered pieces than the kernel takes", 32_256, 2, 1, IOERR);
    check_long(&mut bench, "32768 descriptors, no whole sectors", 32_766, 1, 1, IOERR);
    // One entry more than any queue has.
    header(&bench, IN, 0);
    bench.guest.descriptor(0, TABLE, 32_769 * 16, INDIRECT, 0);
    expect(&mut bench, "32769 descriptors", 0, 0, UNTOUCHED);
}

#[test]
fn every_split_of_header_and_data_and_of_data_and_status() {
    let mut bench = Bench::new(64);
    bench.start();
    for cut in 1..(16 + 512_u32) {
        header(&bench, OUT, 3);
        bench.guest.write(HEADER + 16, &[0xa5; 512]);
        let buffers = [readable(HEADER, cut), readable(HEADER + u64::from(cut), 528 - cut), writable(STATUS, 1)];
        let head = chain_of(&bench.guest, &buffers);
        bench.guest.offer(head);
        bench.step();
        assert_eq!(bench.guest.take_used(), Some((0, 1)), "cut at {cut}");
        assert_eq!(bench.guest.read::<1>(STATUS), [OK], "cut at {cut}");
    }
    let mut sector = [0; 512];
    bench.disks.peek(device::DeviceIndex::PRIMARY, 3 * 512, &mut sector);
    assert_eq!(sector, [0xa5; 512]);
    for cut in 1..513_u32 {
        header(&bench, IN, 3);
        bench.guest.write(BODY, &[UNTOUCHED; 513]);
        let buffers = [readable(HEADER, 16), writable(BODY, cut), writable(BODY + u64::from(cut), 513 - cut)];
        let head = chain_of(&bench.guest, &buffers);
        bench.guest.offer(head);
        bench.step();
        assert_eq!(bench.guest.take_used(), Some((0, 513)), "cut at {cut}");
        assert_eq!(bench.guest.read::<512>(BODY), [0xa5; 512], "cut at {cut}");
        assert_eq!(bench.guest.read::<1>(BODY + 512), [OK], "cut at {cut}");
    }
}

#[test]
fn chains_that_share_descriptors_are_each_given_back() {
    let mut bench = Bench::new(8);
    bench.start();
    header(&bench, FLUSH, 0);
    chain_from(&bench.guest, 0, &[readable(HEADER, 16), writable(STATUS, 1)]);
    bench.guest.descriptor(4, HEADER, 16, NEXT, 1);
    for head in [0, 4, 1] {
        bench.guest.offer(head);
    }
    bench.step();
    let mut used: Vec<_> = std::iter::from_fn(|| bench.guest.take_used()).collect();
    used.sort_unstable();
    assert_eq!(used, [(0, 1), (1, 1), (4, 1)]);
    honest(&mut bench, "chains that share descriptors");
}

/// A ring that lies is left alone until it is restarted, and serves again then.
fn check_broken(name: &str, lie: impl FnOnce(&mut Bench)) {
    let mut bench = Bench::new(8);
    bench.start();
    honest(&mut bench, name);
    lie(&mut bench);
    bench.step();
    let used = bench.guest.used_idx();
    // Nothing more is taken, whatever the ring says.
    bench.guest.restart_at(used);
    header(&bench, FLUSH, 0);
    let head = chain_of(&bench.guest, &[readable(HEADER, 16), writable(STATUS, 1)]);
    bench.guest.offer(head);
    bench.step();
    assert_eq!(bench.guest.used_idx(), used, "{name}");
    assert_eq!(bench.stop(StopHow::Drain), Some(used.into()), "{name}: everything taken was given back");
    bench.guest.restart_at(used);
    bench.start();
    honest(&mut bench, name);
}

#[test]
fn a_ring_that_lies_stops_until_it_is_restarted() {
    check_broken("the index jumps", |bench| bench.guest.set_avail_idx(0x4000));
    check_broken("the index goes back", |bench| bench.guest.set_avail_idx(1));
    check_broken("a head outside of the table", |bench| bench.guest.offer(8));
    check_broken("a head far outside of the table", |bench| bench.guest.offer(u16::MAX));
    check_broken("a head offered twice", |bench| {
        header(bench, IN, 0);
        let head = chain_of(&bench.guest, &framed(&[writable(BODY, 512)]));
        bench.disks.manual(true);
        bench.guest.offer(head);
        bench.guest.offer(head);
        bench.step();
        assert_eq!(bench.plane.in_flight(), 1);
        bench.disks.complete_all();
        bench.disks.manual(false);
    });
}

/// Elements of a list of a packed ring: address, length, flags.
type List = &'static [(u64, u32, u16)];

#[test]
fn broken_lists_of_a_packed_ring_come_back_empty() {
    let mut bench = Bench::packed(8);
    bench.start();
    let lists: &[(&str, List)] = &[
        ("indirect with next", &[(TABLE, 32, INDIRECT), (STATUS, 1, WRITE)]),
        ("indirect after another", &[(HEADER, 16, 0), (TABLE, 16, INDIRECT)]),
        ("indirect of no length", &[(TABLE, 0, INDIRECT)]),
        ("indirect of 17 bytes", &[(TABLE, 17, INDIRECT)]),
        ("indirect of 4 GiB", &[(TABLE, !15, INDIRECT)]),
        ("indirect of one entry more than any queue has", &[(TABLE, 32_769 * 16, INDIRECT)]),
        ("indirect outside of memory", &[(1 << 40, 32, INDIRECT)]),
        ("indirect over the end of memory", &[(MEMORY_END - 16, 32, INDIRECT)]),
        ("indirect at the end of addresses", &[(u64::MAX - 15, 32, INDIRECT)]),
        ("readable after writable", &[(STATUS, 1, WRITE), (HEADER, 16, 0)]),
    ];
    for (name, list) in lists {
        header(&bench, FLUSH, 0);
        bench.packed.as_ref().unwrap().offer(0, list);
        expect_used(&mut bench, name, 0, 0, UNTOUCHED);
    }
}

/// What is reserved in a table means nothing: flags but for one, and the buffer id.
#[test]
fn tables_of_a_packed_ring_are_read_to_their_end() {
    let mut bench = Bench::packed(4);
    bench.start();
    // Buffer ids and flags lie the other way round than in split rings.
    let table = |bench: &Bench, middle: u16, step: u64| {
        header(bench, IN, 0);
        let data = |i: u16| (DATA + 0xc_0000 + u64::from(i) * step, 1, 0x1234, WRITE | NEXT | INDIRECT);
        let entries = [vec![(HEADER, 16, 9, 0x8080)], (0..middle).map(data).collect(), vec![(STATUS, 1, 0, WRITE)]];
        bench.guest.indirect(TABLE, &entries.concat());
        bench.packed.as_ref().unwrap().offer(0, &[(TABLE, (u32::from(middle) + 2) * 16, INDIRECT | WRITE)]);
    };
    for (middle, step, len, status) in
        [(512, 1, 513, OK), (512, 2, 513, OK), (513, 1, 1, IOERR), (32_256, 1, 32_257, OK), (32_256, 2, 1, IOERR)]
    {
        table(&bench, middle, step);
        expect_used(&mut bench, &format!("{middle} entries {step} apart"), 0, len, status);
    }
}

/// As [`check_broken`], of a packed ring, which a driver that begins anew has cleared.
fn check_broken_packed(name: &str, lie: impl FnOnce(&mut Bench)) {
    let mut bench = Bench::packed(8);
    bench.start();
    honest(&mut bench, name);
    lie(&mut bench);
    bench.step();
    assert_eq!(bench.plane.in_flight(), 0, "{name}");
    while take_used(&bench).is_some() {}
    // Nothing more is taken, whatever the ring says.
    header(&bench, FLUSH, 0);
    let driver = bench.packed.as_ref().unwrap();
    for index in 0..8 {
        driver.descriptor(index, (STATUS, 1, WRITE | driver.available_flags(0)), 0);
    }
    bench.step();
    assert_eq!(bench.guest.read::<1>(STATUS), [UNTOUCHED], "{name}");
    assert!(bench.stop(StopHow::Drain).is_some(), "{name}: everything taken was given back");
    bench.packed.as_ref().unwrap().restart();
    bench.set_base(0x8000_8000);
    bench.start();
    honest(&mut bench, name);
}

#[test]
fn a_packed_ring_that_lies_stops_until_it_is_restarted() {
    check_broken_packed("a chain without end", |bench| {
        let driver = bench.packed.as_ref().unwrap();
        // Two chains of three descriptors were used.
        for index in [7, 0, 1, 2, 3, 4, 5, 6] {
            let flags = if index >= 6 { driver.available_flags(0) } else { driver.available_flags(2) };
            driver.descriptor(index, (HEADER, 16, NEXT | flags), 0);
        }
    });
    check_broken_packed("a descriptor offered while the device holds it", |bench| {
        let driver = bench.packed.as_ref().unwrap();
        header(bench, IN, 0);
        let elements = [(HEADER, 16, 0), (BODY, 256, WRITE), (BODY, 256, WRITE), (STATUS, 1, WRITE)];
        driver.offer(1, &elements);
        driver.offer(2, &elements);
        bench.disks.manual(true);
        bench.step();
        assert_eq!(bench.plane.in_flight(), 2);
        let driver = bench.packed.as_ref().unwrap();
        driver.descriptor(6, (STATUS, 1, WRITE | driver.available_flags(0)), 3);
        bench.step();
        bench.disks.complete_all();
        bench.disks.manual(false);
    });
    check_broken_packed("a buffer id offered twice", |bench| {
        let driver = bench.packed.as_ref().unwrap();
        header(bench, IN, 0);
        let elements = [(HEADER, 16, 0), (BODY, 512, WRITE), (STATUS, 1, WRITE)];
        driver.offer(5, &elements);
        driver.offer(5, &elements);
        bench.disks.manual(true);
        bench.step();
        assert_eq!(bench.plane.in_flight(), 1);
        bench.disks.complete_all();
        bench.disks.manual(false);
    });
}
