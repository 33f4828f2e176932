use super::super::buffer::AlignedBuf;
use super::*;

const PRIMARY: DeviceIndex = DeviceIndex::PRIMARY;

fn submit(device: &mut MemoryDevice, kind: OpKind, sector: u64, data: &AlignedBuf) {
    let (len, data) = if kind == OpKind::Flush { (0, IoSlice::EMPTY) } else { (data.len() as u64, data.as_io()) };
    let op = Op { tag: Tag(sector), device: PRIMARY, kind, offset: sector * SECTOR_SIZE, len, data };
    // SAFETY: the tests keep their buffers until the completion, or crash the disks before.
    unsafe { device.submit(op) };
}

fn fill(byte: u8, sectors: usize) -> AlignedBuf {
    AlignedBuf::copy_of(&vec![byte; sectors * SECTOR])
}

fn first_bytes(disks: &MemoryDisks, sectors: u64) -> Vec<u8> {
    let read = |sector| {
        let mut byte = [0];
        disks.peek(PRIMARY, sector * SECTOR_SIZE, &mut byte);
        byte[0]
    };
    (0..sectors).map(read).collect()
}

fn manual_disk() -> (MemoryDisks, MemoryDevice) {
    let disks = MemoryDisks::new(&[1 << 20]);
    disks.manual(true);
    let queue = disks.queue();
    (disks, queue)
}

fn drain(device: &mut MemoryDevice) -> Vec<Event> {
    let mut events = Vec::new();
    device.poll(Time(0), Wait::No, &mut events);
    events
}

#[test]
fn a_flush_covers_what_was_executed_before_it_was_submitted() {
    let (disks, mut queue) = manual_disk();
    let (before, between, after) = (fill(1, 1), fill(2, 1), fill(3, 1));
    submit(&mut queue, OpKind::Write, 0, &before);
    submit(&mut queue, OpKind::Write, 1, &between);
    disks.complete(0);
    submit(&mut queue, OpKind::Flush, 9, &before);
    submit(&mut queue, OpKind::Write, 2, &after);
    disks.complete_all();
    assert_eq!(drain(&mut queue).len(), 4);
    assert_eq!(first_bytes(&disks, 3), [1, 2, 3]);
    disks.crash(|_, _| Keep::Drop);
    assert_eq!(first_bytes(&disks, 3), [1, 0, 0]);
}

#[test]
fn a_crash_tears_writes_between_sectors_and_reaches_pending_ones() {
    let (disks, mut queue) = manual_disk();
    let (old, new, pending) = (fill(1, 4), fill(2, 4), fill(3, 1));
    submit(&mut queue, OpKind::Write, 0, &old);
    submit(&mut queue, OpKind::Write, 0, &new);
    disks.complete_all();
    submit(&mut queue, OpKind::Write, 5, &pending);
    drop(pending);
    let mut offered = Vec::new();
    disks.crash(|_, sector| {
        offered.push(sector.0);
        // Both versions of sector 0, only the old one of 1, only the new one of 2, none of 3.
        let keep = [0, 1, 4, 6, 8].contains(&(offered.len() - 1));
        if keep { Keep::Keep } else { Keep::Drop }
    });
    assert_eq!(offered, [0, 1, 2, 3, 0, 1, 2, 3, 5]);
    assert_eq!(first_bytes(&disks, 6), [2, 1, 2, 0, 0, 3]);
    assert_eq!(queue.in_flight(), 3);
    assert!(drain(&mut queue).is_empty() && queue.in_flight() == 0, "a dead queue reports nothing");
}

#[test]
fn a_killed_process_loses_nothing_executed_and_its_writes_may_land_later() {
    let (disks, mut queue) = manual_disk();
    let (executed, pending) = (fill(1, 1), fill(2, 2));
    submit(&mut queue, OpKind::Write, 0, &executed);
    disks.complete_all();
    submit(&mut queue, OpKind::Write, 1, &pending);
    drop(queue);
    assert_eq!(disks.pending(0).queue, None);
    let copy = disks.fork();
    disks.kill(|_, sector| if sector.0 == 2 { Keep::Keep } else { Keep::Drop });
    assert_eq!(first_bytes(&disks, 3), [1, 0, 2]);
    copy.complete_all();
    assert_eq!(first_bytes(&copy, 3), [1, 2, 2]);
    copy.crash(|_, _| Keep::Drop);
    assert_eq!(first_bytes(&copy, 3), [0, 0, 0]);
}

#[test]
fn a_forced_failure_lands_where_it_is_told() {
    let (disks, mut queue) = manual_disk();
    let data = fill(7, 3);
    submit(&mut queue, OpKind::Write, 0, &data);
    disks.complete_as(0, Err(Errno(libc::EIO)), |sector| sector.0 == 1);
    assert_eq!(first_bytes(&disks, 3), [0, 7, 0]);
    let read = AlignedBuf::zeroed(1024);
    submit(&mut queue, OpKind::Read, 1, &read);
    disks.complete_as(0, Err(Errno(libc::EIO)), |_| false);
    assert!(read.iter().all(|byte| *byte == GARBAGE));
    assert_eq!(drain(&mut queue).len(), 2);
}

#[test]
fn what_a_failed_flush_lost_no_later_flush_brings_back() {
    let (disks, mut queue) = manual_disk();
    let data = fill(7, 2);
    submit(&mut queue, OpKind::Write, 0, &data);
    disks.complete_all();
    submit(&mut queue, OpKind::Flush, 9, &data);
    disks.complete_as(0, Err(Errno(libc::EIO)), |sector| sector.0 == 0);
    submit(&mut queue, OpKind::Flush, 9, &data);
    disks.complete_all();
    assert_eq!(first_bytes(&disks, 2), [7, 7], "reads still see it");
    disks.crash(|_, _| Keep::Keep);
    assert_eq!(first_bytes(&disks, 2), [7, 0], "the power cut shows the loss");
}

#[test]
fn absent_and_shrunk_disks_are_found_out() {
    let (disks, mut queue) = manual_disk();
    let results = |events: Vec<Event>| -> Vec<Result<(), Errno>> {
        let result = |event| match event {
            Event::Done(completion) => completion.result,
            Event::Ready(_) => unreachable!(),
        };
        events.into_iter().map(result).collect()
    };
    let op = |kind| Op { tag: Tag(0), device: PRIMARY, kind, offset: 0, len: 0, data: IoSlice::EMPTY };
    // SAFETY: no memory is named.
    unsafe { queue.submit(op(OpKind::Identify)) };
    disks.complete_all();
    disks.set_size(PRIMARY, 4096);
    // SAFETY: as above.
    unsafe { queue.submit(op(OpKind::Identify)) };
    disks.complete_all();
    disks.set_gone(PRIMARY, true);
    // SAFETY: as above.
    unsafe { queue.submit(op(OpKind::Flush)) };
    disks.complete_all();
    assert_eq!(results(drain(&mut queue)), [Ok(()), Err(Errno(libc::ENXIO)), Err(Errno(libc::ENODEV))]);
}
