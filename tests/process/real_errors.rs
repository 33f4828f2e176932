//! A primary that fails on its own: what the kernel reports, not a rule of the server. A storage daemon
//! offers its file and fails operations on it; direct reads and writes bring back real error numbers.

use std::time::Duration;

use crate::disks::{Exported, Fault, Which};
use crate::faults::failing;
use crate::guest::{Failed, Guest, Io};
use crate::model::{Model, Random, pattern};
use crate::server::Server;

const ENGINES: [&str; 2] = ["io_uring", "threads"];
const WRITES: &[&str] = &["write", "write-zeroes"];
/// But flushes: the daemon flushes the node itself when the rules change.
const EVERYTHING: &[&str] = &["read", "write", "write-zeroes", "discard"];

/// A served volume on an exported, adopted primary, of which sectors 960 to 1215 are written.
struct Ground {
    model: Model,
    guest: Guest,
    server: Server,
    exported: Exported,
}

impl Ground {
    fn new(test: &str, engine: &str, options: &[&str]) -> Option<Ground> {
        let exported = Exported::adopt(test)?;
        let server = exported.serve(engine, options);
        let mut guest = server.guest(1);
        let model = Model::written(&mut guest, 960, 256, 1);
        Some(Ground { model, guest, server, exported })
    }

    fn fail(&mut self, faults: &[Fault]) {
        self.exported.primary().fail(faults);
    }

    /// Write a pattern, here and in the model.
    fn write(&mut self, sector: u64, count: u64, stamp: u64) {
        let write = self.model.write(sector, pattern(sector, count, stamp));
        self.guest.queue().one(write).unwrap();
    }

    fn write_fails(&mut self, sector: u64, count: u64) {
        assert_eq!(self.guest.write(sector, self.model.sectors(sector, count).to_vec()), Err(Failed::IoErr));
    }

    #[track_caller]
    fn check_all(&mut self) {
        self.model.check_all(self.guest.queue());
    }

    /// The server crashes and starts again on a device without faults: everything is there.
    fn check_restarted(mut self, engine: &str) {
        let list = self.server.order(&["list", "--json"]);
        self.server.kill();
        drop(self.guest);
        self.exported.mend();
        let server = self.exported.serve(engine, &[]);
        assert_eq!(server.order(&["list", "--json"]), list);
        self.model.check_all(server.guest(1).queue());
        assert_eq!(server.status().counters.guest_errors, 0);
        server.stop();
    }
}

/// E1, Medium: W1 and W2 with EIO of the kernel's.
#[test]
fn a_block_that_really_takes_no_writes_moves_and_the_guest_does_not_notice() {
    let name = "a_block_that_really_takes_no_writes_moves_and_the_guest_does_not_notice";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        ground.fail(&[Fault::of(WRITES, libc::EIO).at(1001..1003)]);
        ground.write(1000, 4, 2);
        ground.check_all();
        ground.write(1002, 1, 3);
        ground.guest.flush().unwrap();
        ground.check_all();
        let status = ground.server.status();
        assert_eq!(ground.server.blocks("remapped"), [1000]);
        assert_eq!((status.counters.guest_errors, status.counters.remaps, &status.state[0][..]), (0, 1, "ok"));
        // The shard's try and the healer's.
        assert_eq!((status.devices[0].write_errors, status.devices[0].read_errors), (2, 0));
        ground.check_restarted(engine);
    }
}

/// R2, R4, W4 with EIO of the kernel's.
#[test]
fn sectors_that_really_do_not_read_fail_exactly_and_are_lost_only_when_their_block_moves() {
    let name = "sectors_that_really_do_not_read_fail_exactly_and_are_lost_only_when_their_block_moves";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        let unreadable = Fault::of(&["read"], libc::EIO).at(1003..1005);
        ground.fail(std::slice::from_ref(&unreadable));
        assert_eq!(failing(&mut ground.guest, 980..1030), [1003, 1004]);
        assert_eq!(ground.guest.read(960, 256), Err(Failed::IoErr));
        ground.model.check(ground.guest.queue(), 1005, 200);
        assert_eq!(
            (ground.server.blocks("pending"), &ground.server.list()[0].pending[..]),
            (vec![1000], &[1003, 1004][..])
        );
        let status = ground.server.status();
        assert_eq!((status.blocks.remapped, status.blocks.lost_sectors, status.counters.guest_errors), (0, 0, 3));
        let causes = ground.server.causes("guest-error");
        assert!(causes.iter().all(|cause| cause.contains("Input/output error (os error 5)")), "{causes:?}");
        // Now it takes no writes either.
        ground.fail(&[unreadable, Fault::of(WRITES, libc::EIO).at(1000..1008)]);
        ground.write(1001, 1, 2);
        assert_eq!(failing(&mut ground.guest, 990..1020), [1003, 1004]);
        assert_eq!(ground.server.list()[0].lost, [1003, 1004]);
        // R3: the device reads again, and what was lost is kept.
        ground.exported.mend();
        ground.check_all();
        let status = ground.server.status();
        assert_eq!((status.blocks.lost_sectors, status.counters.healed), (0, 2));
        ground.check_restarted(engine);
    }
}

/// R2, W1: what fails once is done again.
#[test]
fn a_real_error_that_does_not_come_again_moves_nothing() {
    let name = "a_real_error_that_does_not_come_again_moves_nothing";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        ground.fail(&[Fault::of(&["read"], libc::EIO).at(1003..1004).once()]);
        ground.model.check(ground.guest.queue(), 1000, 8);
        ground.fail(&[Fault::of(&["write"], libc::ENODATA).at(1003..1004).once()]);
        ground.write(1000, 8, 2);
        ground.check_all();
        let status = ground.server.status();
        let counters = &status.counters;
        assert_eq!(
            (counters.recovered_reads, counters.rewritten, counters.remaps, counters.guest_errors),
            (1, 1, 0, 0)
        );
        assert_eq!((status.devices[0].read_errors, status.devices[0].write_errors), (1, 1));
        assert_eq!(ground.server.causes("rewritten"), ["No data available (os error 61)"]);
        assert!(ground.server.list().is_empty());
        ground.check_restarted(engine);
    }
}

/// F2 with fdatasync that fails.
#[test]
fn a_real_flush_error_poisons_the_volume_until_it_is_cleared() {
    let name = "a_real_flush_error_poisons_the_volume_until_it_is_cleared";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        ground.fail(&[Fault::of(&["flush"], libc::EIO).once()]);
        // The daemon flushes only where something was written.
        ground.write(1000, 8, 2);
        assert_eq!(ground.guest.flush(), Err(Failed::IoErr));
        assert_eq!(ground.guest.flush(), Err(Failed::IoErr));
        ground.write_fails(1000, 8);
        ground.check_all();
        assert_eq!(ground.server.status().state, ["poisoned"]);
        assert_eq!(ground.server.causes("poisoned"), ["Input/output error (os error 5)"]);
        assert_eq!(ground.server.status().devices[0].flush_errors, 1);
        ground.server.kill();
        drop(ground.guest);
        let server = ground.exported.serve(engine, &[]);
        let mut guest = server.guest(1);
        assert_eq!((&server.status().state[0][..], guest.flush()), ("poisoned", Err(Failed::IoErr)));
        server.order(&["clear"]);
        ground = Ground { server, guest, ..ground };
        ground.write(1000, 8, 3);
        ground.guest.flush().unwrap();
        ground.check_all();
        assert_eq!(ground.server.status().state, ["ok"]);
        ground.check_restarted(engine);
    }
}

/// E1, Medium and Target: what a block device's driver says of a bad sector, and of a target that cannot.
#[test]
fn each_real_error_of_the_medium_moves_the_block() {
    let name = "each_real_error_of_the_medium_moves_the_block";
    let Some(mut ground) = Ground::new(name, "threads", &[]) else { return };
    let errors = [libc::EIO, libc::ENODATA, libc::EILSEQ, libc::EREMOTEIO, libc::EOPNOTSUPP];
    for (block, errno) in (120..).zip(errors) {
        ground.fail(&[Fault::of(WRITES, errno).at(block * 8..block * 8 + 8)]);
        ground.write(block * 8 + 3, 2, block);
        ground.check_all();
        assert!(ground.server.blocks("remapped").contains(&(block * 8)), "error {errno}: {:?}", ground.server.list());
    }
    let status = ground.server.status();
    assert_eq!((status.blocks.remapped, status.counters.guest_errors, &status.state[0][..]), (5, 0, "ok"));
    ground.check_restarted("threads");
}

/// E1, Gone: one such error is enough, nothing is remapped, and the device is found again by itself.
#[test]
fn each_real_error_of_a_gone_device_opens_the_breaker() {
    let name = "each_real_error_of_a_gone_device_opens_the_breaker";
    let Some(mut ground) = Ground::new(name, "threads", &[]) else { return };
    let errors = [
        (libc::ENODEV, "No such device (os error 19)"),
        (libc::ENXIO, "No such device or address (os error 6)"),
        (libc::ENOTCONN, "Transport endpoint is not connected (os error 107)"),
        (libc::ESTALE, "Stale file handle (os error 116)"),
        (libc::ENOLINK, "Link has been severed (os error 67)"),
        (libc::EROFS, "Read-only file system (os error 30)"),
        (libc::ETIMEDOUT, "Connection timed out (os error 110)"),
    ];
    for (round, (errno, text)) in errors.into_iter().enumerate() {
        ground.fail(&[Fault::of(EVERYTHING, errno)]);
        if round % 2 == 0 {
            ground.write_fails(1000, 8);
        } else {
            assert_eq!(ground.guest.read(1000, 8), Err(Failed::IoErr));
        }
        assert_eq!(ground.server.status().state, ["primary-gone"], "error {errno}");
        assert_eq!(ground.server.causes("device-gone").last().map(String::as_str), Some(text));
        assert_eq!(ground.guest.read(1100, 8), Err(Failed::IoErr));
        ground.exported.mend();
        await_back(&ground.server, round + 1);
        ground.write(1000, 8, round as u64);
        ground.check_all();
    }
    let status = ground.server.status();
    assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.rewritten), (0, 0, 0));
    ground.check_restarted("threads");
}

/// Wait until the primary has come back for the `times`-th time.
fn await_back(server: &Server, times: usize) {
    let mut seen = 0;
    let mut after = 0;
    while seen < times {
        let event = server.await_event_after("device-back", after);
        after = event.seq;
        seen += 1;
    }
}

/// E1, Space and Unlisted: that write fails, and that is all.
#[test]
fn a_real_error_that_is_not_the_medium_s_fails_only_that_write() {
    let name = "a_real_error_that_is_not_the_medium_s_fails_only_that_write";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        let errors = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EPERM, libc::EBADMSG, libc::EUCLEAN];
        for errno in errors {
            ground.fail(&[Fault::of(WRITES, errno).at(1000..1008)]);
            ground.write_fails(1000, 8);
            assert_eq!(ground.server.status().state, ["ok"], "error {errno}");
            ground.write(1008, 8, u64::from(errno.unsigned_abs()));
            ground.guest.flush().unwrap();
            ground.check_all();
            let expected = std::io::Error::from_raw_os_error(errno).to_string();
            assert_eq!(ground.server.causes("guest-error").last(), Some(&expected));
        }
        let status = ground.server.status();
        assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.rewritten), (0, 0, 0));
        assert_eq!(status.counters.guest_errors, errors.len() as u64);
        ground.check_restarted(engine);
    }
}

/// E1, Ours: tried again, and nobody hears of it.
#[test]
fn a_real_error_of_ours_is_tried_again_and_not_counted_against_the_disk() {
    let name = "a_real_error_of_ours_is_tried_again_and_not_counted_against_the_disk";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &[]) else { return };
        for errno in [libc::EINVAL, libc::EFAULT, libc::EAGAIN, libc::ENOMEM, libc::ECANCELED] {
            ground.fail(&[Fault::of(&["write", "read"], errno).at(1000..1001).once()]);
            ground.write(1000, 8, u64::from(errno.unsigned_abs()));
            ground.check_all();
        }
        let status = ground.server.status();
        assert_eq!((status.counters.guest_errors, status.counters.rewritten, status.blocks.remapped), (0, 0, 0));
        assert_eq!((status.devices[0].write_errors, status.devices[0].read_errors), (0, 0));
        assert!(ground.server.list().is_empty(), "{:?}", ground.server.list());
        ground.check_restarted(engine);
    }
}

/// E1: EIO everywhere, probe included, is a lost device; held requests wait for it.
#[test]
fn a_device_that_really_answers_eio_to_everything_is_gone_until_it_answers_again() {
    let name = "a_device_that_really_answers_eio_to_everything_is_gone_until_it_answers_again";
    for engine in ENGINES {
        let Some(mut ground) = Ground::new(name, engine, &["--on-device-loss", "hold"]) else { return };
        ground.fail(&[Fault::of(EVERYTHING, libc::EIO)]);
        let queue = ground.guest.queue();
        let tokens = [
            queue.submit(&ground.model.write(1000, pattern(1000, 8, 2))),
            queue.submit(&Io::Read { sector: 1100, count: 8 }),
        ];
        ground.server.await_event("device-gone");
        assert_eq!(queue.wait_for(Duration::from_millis(300)), []);
        assert_eq!(ground.server.status().state, ["primary-gone"]);
        ground.exported.mend();
        let mut ended = Vec::new();
        while ended.len() < tokens.len() {
            ended.extend(ground.guest.queue().wait());
        }
        assert!(ended.iter().all(|(_, reply)| reply.is_ok()), "{ended:?}");
        ground.check_all();
        let status = ground.server.status();
        assert_eq!((status.blocks.remapped, status.blocks.pending, status.counters.guest_errors), (0, 0, 0));
        ground.check_restarted(engine);
    }
}

/// Bad places on both devices, requests of all sizes from two queues.
#[test]
fn random_requests_on_two_really_failing_devices_agree_with_a_model() {
    let name = "random_requests_on_two_really_failing_devices_agree_with_a_model";
    let Some(mut exported) = Exported::create(name, Which::Both) else { return };
    let server = exported.serve("threads", &[]);
    let mut guest = server.guest(2);
    let mut model = Model::written(&mut guest, 8192, 1024, 1);
    let bad_slot = crate::spare::slot_start(&exported.volume, 1);
    exported.primary().fail(&[
        Fault::of(WRITES, libc::EIO).at(8300..8330),
        Fault::of(WRITES, libc::ENODATA).at(8500..8501),
        Fault::of(&["write"], libc::EIO).at(8700..8720).once(),
        Fault::of(&["read"], libc::EIO).at(8800..8810).once(),
    ]);
    exported.spare().fail(&[Fault::of(WRITES, libc::EIO).at(bad_slot..bad_slot + 8)]);
    let mut random = Random(9);
    for round in 0..200 {
        let count = 1 + random.below(64);
        let sector = 8192 + random.below(1024 - count);
        let queue = &mut guest.queues[usize::try_from(round % 2).unwrap()];
        let write = model.write(sector, pattern(sector, count, round));
        queue.one(write).unwrap();
        let count = 1 + random.below(64);
        let sector = 8192 + random.below(1024 - count);
        model.check(&mut guest.queues[usize::try_from((round + 1) % 2).unwrap()], sector, count);
    }
    guest.flush().unwrap();
    model.check_all(guest.queue());
    // Off the path: the slot its block left is retired in a commit of its own.
    let status = server.await_status(|status| status.blocks.slots_retired > 0);
    assert_eq!((status.counters.guest_errors, status.blocks.slots_retired, &status.state[0][..]), (0, 1, "ok"));
    assert!(status.devices.iter().all(|device| device.write_errors > 0), "{status:?}");
    let list = server.order(&["list", "--json"]);
    assert!(server.blocks("remapped").len() >= 5, "{list}");
    server.kill();
    drop(guest);
    exported.mend();
    let server = exported.serve("threads", &[]);
    assert_eq!(server.order(&["list", "--json"]), list);
    model.check_all(server.guest(1).queue());
    server.stop();
}
