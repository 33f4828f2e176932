//! A spare that fails on its own: slots, metadata, flushes or all of it, with errors of the kernel's. The
//! primary goes on, and what the guest wrote is there.

use std::fs;

use vhost_remap::volume::layout::{Layout, Place};

use crate::disks::{Exported, Fault, Which};
use crate::guest::{Failed, Guest};
use crate::model::{Model, pattern};
use crate::server::Server;
use crate::spare::slot_start;

const WRITES: &[&str] = &["write", "write-zeroes"];
/// But flushes: the daemon flushes the node itself when the rules change.
const EVERYTHING: &[&str] = &["read", "write", "write-zeroes", "discard"];

/// Sectors of the primary that take no writes.
const BAD: std::ops::Range<u64> = 1000..1008;

/// A served volume with an exported spare, or with both devices exported and [`BAD`] really bad; sectors 960
/// to 1215 are written.
struct Ground {
    model: Model,
    guest: Guest,
    server: Server,
    exported: Exported,
}

impl Ground {
    fn new(test: &str, which: Which) -> Option<Ground> {
        let mut exported = Exported::create(test, which)?;
        let server = exported.serve("threads", &[]);
        let mut guest = server.guest(1);
        let model = Model::written(&mut guest, 960, 256, 1);
        guest.flush().unwrap();
        if which == Which::Both {
            exported.primary().fail(&[Fault::of(WRITES, libc::EIO).at(BAD)]);
        }
        Some(Ground { model, guest, server, exported })
    }

    fn fail(&mut self, faults: &[Fault]) {
        self.exported.spare().fail(faults);
    }

    fn write(&mut self, sector: u64, count: u64, stamp: u64) {
        let write = self.model.write(sector, pattern(sector, count, stamp));
        self.guest.queue().one(write).unwrap();
    }

    /// A write of 8 sectors that fails, and leaves them old or new (W7).
    fn write_fails(&mut self, sector: u64, stamp: u64) {
        assert_eq!(self.guest.write(sector, pattern(sector, 8, stamp)), Err(Failed::IoErr));
    }

    /// After [`Ground::write_fails`]: which they are.
    fn settle(&mut self, sector: u64, stamp: u64) {
        self.model.settle(self.guest.queue(), sector, &pattern(sector, 8, stamp));
    }

    #[track_caller]
    fn check_all(&mut self) {
        self.model.check_all(self.guest.queue());
    }

    fn slot_of(&self, sector: u64) -> u32 {
        let list = self.server.list();
        list.iter().find(|entry| entry.sector == sector).and_then(|entry| entry.slot).expect("remapped")
    }

    /// Sectors of a place of the metadata.
    fn place(&self, place: Place) -> std::ops::Range<u64> {
        let size = fs::metadata(&self.exported.volume.spare).unwrap().len();
        let layout = Layout::new(size, 64).unwrap();
        let start = layout.place_start(place) / 512;
        start..start + layout.place_len() / 512
    }

    /// The server crashes and starts again on devices without faults: everything is there.
    fn check_restarted(mut self) {
        let list = self.server.order(&["list", "--json"]);
        self.server.kill();
        drop(self.guest);
        self.exported.mend();
        let server = self.exported.serve("threads", &[]);
        assert_eq!((server.order(&["list", "--json"]), &server.status().state[0][..]), (list, "ok"));
        self.model.check_all(server.guest(1).queue());
        assert_eq!(server.status().counters.guest_errors, 0);
        server.stop();
    }
}

/// E3: the block of a bad primary meets a bad slot.
#[test]
fn a_slot_that_really_takes_no_writes_is_retired_and_another_is_taken() {
    let name = "a_slot_that_really_takes_no_writes_is_retired_and_another_is_taken";
    let Some(mut ground) = Ground::new(name, Which::Both) else { return };
    let slot = slot_start(&ground.exported.volume, 0);
    ground.fail(&[Fault::of(WRITES, libc::EIO).at(slot + 5..slot + 6)]);
    ground.write(1002, 2, 2);
    ground.check_all();
    assert_eq!(ground.slot_of(1000), 1);
    // Its slot goes bad in turn, with what a disk says of it.
    let slot = slot_start(&ground.exported.volume, 1);
    ground.fail(&[Fault::of(WRITES, libc::ENODATA).at(slot..slot + 8)]);
    ground.write(1003, 2, 3);
    ground.guest.flush().unwrap();
    ground.check_all();
    assert_eq!(ground.slot_of(1000), 2);
    // Off the path: the slot it left is retired in a commit of its own.
    let status = ground.server.await_status(|status| status.blocks.slots_retired > 1);
    assert_eq!((status.blocks.slots_retired, status.counters.guest_errors, &status.state[0][..]), (2, 0, "ok"));
    assert!(status.devices[0].write_errors >= 2 && status.devices[1].write_errors >= 2, "{:?}", status.devices);
    let causes = ground.server.causes("slot-failed");
    assert!(causes[0].contains("Input/output error (os error 5)"), "{causes:?}");
    ground.check_restarted();
}

/// E3: that a slot does not read loses nothing.
#[test]
fn a_slot_that_really_does_not_read_fails_exactly_its_sectors() {
    let name = "a_slot_that_really_does_not_read_fails_exactly_its_sectors";
    let Some(mut ground) = Ground::new(name, Which::Both) else { return };
    ground.write(1000, 8, 2);
    let slot = slot_start(&ground.exported.volume, ground.slot_of(1000));
    ground.fail(&[Fault::of(&["read"], libc::EIO).at(slot + 3..slot + 4)]);
    for (sector, count) in [(1003, 1), (1000, 8), (960, 256)] {
        assert_eq!(ground.guest.read(sector, count), Err(Failed::IoErr), "{count} from {sector}");
    }
    ground.model.check(ground.guest.queue(), 960, 43);
    ground.model.check(ground.guest.queue(), 1004, 200);
    assert_eq!(ground.server.blocks("pending"), [1000]);
    let causes = ground.server.causes("guest-error");
    assert!(causes.iter().all(|cause| cause.contains("Input/output error (os error 5)")), "{causes:?}");
    ground.exported.spare().mend();
    ground.check_all();
    let status = ground.server.status();
    assert_eq!((status.blocks.pending, status.blocks.lost_sectors, status.blocks.slots_retired), (0, 0, 0));
    ground.check_restarted();
}

/// One place of two is enough; a spare that takes metadata in neither is down until it does.
#[test]
fn metadata_that_really_cannot_be_written_retires_its_place_and_then_the_spare() {
    let name = "metadata_that_really_cannot_be_written_retires_its_place_and_then_the_spare";
    let Some(mut ground) = Ground::new(name, Which::Both) else { return };
    let head = Fault::of(&["write"], libc::EIO).at(ground.place(Place::Head));
    ground.fail(std::slice::from_ref(&head));
    ground.write(1000, 8, 2);
    ground.guest.flush().unwrap();
    ground.check_all();
    assert_eq!(ground.server.status().state, ["place-retired"]);
    assert!(ground.server.causes("place-retired")[0].contains("Input/output error (os error 5)"));
    let tail = Fault::of(&["write"], libc::EIO).at(ground.place(Place::Tail));
    ground.fail(&[head, tail]);
    ground.exported.primary().fail(&[Fault::of(WRITES, libc::EIO).at(1000..1016)]);
    ground.write_fails(1008, 3);
    assert_eq!(ground.server.status().state[0], "spare-down");
    ground.write(1016, 64, 4);
    ground.guest.flush().unwrap();
    ground.model.check(ground.guest.queue(), 1016, 200);
    ground.exported.spare().mend();
    ground.server.await_event("spare-back");
    ground.settle(1008, 3);
    ground.write(1008, 8, 5);
    ground.guest.flush().unwrap();
    ground.check_all();
    assert_eq!(ground.server.blocks("remapped"), [1000, 1008]);
    ground.check_restarted();
}

/// F3, E1: a spare that answers nothing but errors costs only what lives on it.
#[test]
fn a_spare_that_really_answers_only_errors_is_down_until_it_answers_again() {
    let name = "a_spare_that_really_answers_only_errors_is_down_until_it_answers_again";
    for errno in [libc::EIO, libc::ENXIO, libc::ETIMEDOUT] {
        let Some(mut ground) = Ground::new(name, Which::Spare) else { return };
        ground.server.order(&["remap", "1000-1015"]);
        ground.guest.flush().unwrap();
        ground.fail(&[Fault::of(EVERYTHING, errno)]);
        assert_eq!(ground.guest.read(1000, 8), Err(Failed::IoErr));
        let status = ground.server.status();
        assert_eq!((&status.state[..], &status.devices[1].state[..]), (&["spare-down".to_owned()][..], "down"));
        let text = std::io::Error::from_raw_os_error(errno).to_string();
        assert_eq!(ground.server.causes("spare-down"), [text]);
        ground.write_fails(1008, 2);
        ground.write(960, 40, 3);
        ground.write(1016, 64, 3);
        ground.guest.flush().unwrap();
        ground.model.check(ground.guest.queue(), 960, 40);
        ground.model.check(ground.guest.queue(), 1016, 200);
        ground.exported.spare().mend();
        ground.server.await_event("spare-back");
        ground.settle(1008, 2);
        ground.write(1000, 16, 4);
        ground.guest.flush().unwrap();
        ground.check_all();
        let status = ground.server.status();
        assert_eq!((status.blocks.remapped, status.blocks.slots_retired, &status.state[0][..]), (2, 0, "ok"));
        ground.check_restarted();
    }
}

/// F3: what a failed fdatasync of the spare costs depends on what it held.
#[test]
fn a_real_flush_error_of_the_spare_poisons_only_where_it_held_unflushed_data() {
    let name = "a_real_flush_error_of_the_spare_poisons_only_where_it_held_unflushed_data";
    let Some(mut ground) = Ground::new(name, Which::Both) else { return };
    let flush_fails = [Fault::of(&["flush"], libc::EIO).once()];
    // A block on its way to a slot: the flush is the committer's, and nobody has been promised anything.
    ground.fail(&flush_fails);
    ground.write_fails(1000, 2);
    assert_eq!(ground.server.status().state, ["spare-down"]);
    assert!(ground.server.causes("spare-down")[0].contains("flush failed: Input/output error (os error 5)"));
    ground.server.await_event("spare-back");
    ground.settle(1000, 2);
    ground.write(1000, 8, 3);
    ground.guest.flush().unwrap();
    ground.check_all();
    // A write into the slot that was answered, and not flushed.
    ground.write(1001, 2, 4);
    ground.fail(&flush_fails);
    ground.write(1005, 1, 5);
    assert_eq!(ground.guest.flush(), Err(Failed::IoErr));
    assert_eq!(ground.server.status().state, ["poisoned"]);
    assert_eq!(ground.server.status().devices[1].flush_errors, 2);
    ground.check_all();
    assert_eq!(ground.guest.write(1200, pattern(1200, 8, 3)), Err(Failed::IoErr));
    ground.server.order(&["clear"]);
    ground.write(1001, 2, 6);
    ground.guest.flush().unwrap();
    ground.check_all();
    ground.check_restarted();
}
