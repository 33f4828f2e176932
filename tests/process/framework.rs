//! Service on rust-vmm's daemon, where front-ends and guests are not as they should be; ours beside it, where
//! nothing else shows that.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use vhost_remap::runtime::report::StatusReport;

use crate::frontend::{FrontEnd, INDIRECT, NEXT, Raw, Ring, Setup, WRITE};
use crate::guest::Io;
use crate::model::{Model, pattern};
use crate::server::{Server, TRANSPORTS, Volume, refusal};

pub(crate) const SETUP: Setup = Setup { queues: 2, size: 16, without: 0 };
const LIMIT: Duration = Duration::from_secs(30);

/// Write the header of a request on one sector and a chain for it, from that descriptor on. Buffers are 4 KiB apart
/// for each descriptor, so that several may be under way.
pub(crate) fn chain(ring: &Ring, first: u16, kind: u32, sector: u64) {
    let at = ring.area() + u64::from(first) * 4096;
    ring.write(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat());
    let data = if kind == 0 { NEXT | WRITE } else { NEXT };
    ring.descriptor(first, (at, 16, NEXT, first + 1));
    ring.descriptor(first + 1, (at + 512, 512, data, first + 2));
    ring.descriptor(first + 2, (at + 16, 1, WRITE, 0));
}

pub(crate) fn status(ring: &Ring, first: u16) -> u8 {
    ring.read(ring.area() + u64::from(first) * 4096 + 16, 1)[0]
}

/// An honest read of a sector.
#[track_caller]
fn read(ring: &mut Ring, sector: u64) -> Vec<u8> {
    chain(ring, 0, 0, sector);
    ring.offer(0);
    assert_eq!(ring.take(LIMIT), Some((0, 513)));
    assert_eq!(status(ring, 0), 0);
    ring.read(ring.area() + 512, 512)
}

/// Wait until a rule of limited count has struck as often as it can.
fn await_spent_rules(server: &Server) {
    let deadline = Instant::now() + LIMIT;
    while !server.order(&["fault", "list"]).contains("no fault rules") {
        assert!(Instant::now() < deadline, "no request has reached the device");
    }
}

#[test]
fn the_transport_is_named_and_survives_many_front_ends() {
    let volume = Volume::create(32, 64);
    for transport in TRANSPORTS {
        let server = volume.serve(&["--transport", transport]);
        let named = format!("{transport} transport");
        assert!(server.announcement.contains(&named), "{}", server.announcement);
        assert!(server.order(&["status"]).contains(&format!("not connected, {named}")));
        let mut guest = server.guest(2);
        let mut model = Model::written(&mut guest, 960, 256, 1);
        drop(guest);
        for round in 0..20 {
            let mut guest = server.guest(2);
            model.check(guest.queue(), 960, 64);
            let write = model.write(1000 + round, pattern(1000 + round, 8, round));
            guest.queues[1].one(write).unwrap();
            assert!(server.status().connected);
            drop(guest);
            let mut front_end = FrontEnd::connect(&server.socket, SETUP);
            assert_eq!(read(&mut front_end.rings[1], 1000 + round), model.sectors(1000 + round, 1));
            // A driver that is reset, and a ring that goes on where it stopped.
            front_end.reset();
            front_end.start(0, 0);
            read(&mut front_end.rings[0], 960);
            assert_eq!(front_end.stop(0), 1);
            front_end.start(0, 1);
            read(&mut front_end.rings[0], 960);
            if round % 3 == 0 {
                // Not even a whole message.
                drop(front_end);
                UnixStream::connect(&server.socket).unwrap().write_all(&[1, 0, 0]).unwrap();
            }
        }
        model.check_all(server.guest(1).queue());
        server.stop();
    }
}

/// All that was under way has ended before the next session begins.
#[test]
fn a_front_end_killed_in_mid_flight_leaves_old_or_new_data() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        let old = Model::written(&mut server.guest(1), 960, 256, 1);
        for stamp in 2..5 {
            server.fault(&["--ops", "write", "--delay", "200", "--count", "8"]);
            let mut front_end = FrontEnd::connect(&server.socket, SETUP);
            for ring in &mut front_end.rings {
                for number in 0..5 {
                    let sector = 1000 + 8 * u64::from(number) + ring.area() % 7;
                    chain(ring, 3 * number, 1, sector);
                    ring.write(ring.area() + 3 * u64::from(number) * 4096 + 512, &pattern(sector, 1, stamp));
                    ring.offer(3 * number);
                }
            }
            await_spent_rules(&server);
            drop(front_end);
            let mut guest = server.guest(1);
            for sector in 960..1216 {
                let found = guest.read(sector, 1).unwrap();
                let possible = (2..=stamp).map(|stamp| pattern(sector, 1, stamp)).any(|new| found == new);
                assert!(possible || found == old.sectors(sector, 1), "{transport}: sector {sector}");
            }
            // Nothing lands later.
            let write = Io::Write { sector: 960, data: old.bytes.clone() };
            guest.queue().one(write).unwrap();
            old.check_all(guest.queue());
        }
        assert_eq!(server.status().state, ["ok"]);
        server.stop();
    }
}

/// A ring that lies is left alone until it is restarted; the others go on.
#[test]
fn no_ring_that_lies_ends_the_server() {
    type Lie = (&'static str, fn(&mut Ring));
    let lies: [Lie; 5] = [
        ("more entries than the ring has", |ring| ring.lie(0x4000)),
        ("fewer entries than before", |ring| ring.lie(u16::MAX)),
        ("a head outside of the table", |ring| ring.offer(16)),
        ("a head far outside of the table", |ring| ring.offer(u16::MAX)),
        ("a head offered twice", |ring| {
            chain(ring, 0, 0, 4000);
            ring.offer(0);
            ring.offer(0);
            ring.kick();
        }),
    ];
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        let mut front_end = FrontEnd::connect(&server.socket, SETUP);
        for (name, lie) in lies {
            println!("{transport}: {name}");
            read(&mut front_end.rings[0], 8);
            server.fault(&["--ops", "read", "--sectors", "4000", "--delay", "300"]);
            let noticed = || server.log_text().matches("queue 0 is broken until it is restarted").count();
            let before = noticed();
            lie(&mut front_end.rings[0]);
            let deadline = Instant::now() + LIMIT;
            while noticed() == before {
                assert!(Instant::now() < deadline, "{transport}: {name}: not noticed");
                read(&mut front_end.rings[1], 8);
            }
            let used = front_end.stop(0);
            assert_eq!(used, front_end.rings[0].used_idx(), "what was taken was given back");
            front_end.start(0, used);
            read(&mut front_end.rings[0], 8);
            server.no_faults();
        }
        drop(front_end);
        server.stop();
    }
}

/// O4: a clean close, and no sector but old or new.
#[test]
fn a_stop_with_requests_under_way_closes_cleanly() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        let old = Model::written(&mut server.guest(1), 960, 256, 1);
        server.fault(&["--ops", "write", "--delay", "300", "--count", "6"]);
        let mut guest = server.guest(2);
        for number in 0..24_u64 {
            let sector = 964 + 10 * number;
            let queue = &mut guest.queues[usize::try_from(number % 2).unwrap()];
            queue.submit(&Io::Write { sector, data: pattern(sector, 3, 2) });
        }
        await_spent_rules(&server);
        server.stop();
        drop(guest);
        let server = volume.serve(&["--transport", transport]);
        assert!(server.events().is_empty(), "{:?}", server.events());
        let mut guest = server.guest(1);
        for sector in 960..1216 {
            let found = guest.read(sector, 1).unwrap();
            assert!(found == old.sectors(sector, 1) || found == pattern(sector, 1, 2), "sector {sector}");
        }
    }
}

/// O5: nothing remembers a request that is given up, and a front-end must not wait for an operator.
#[test]
fn a_stop_answers_what_is_held() {
    let volume = Volume::create(32, 16);
    let server = volume.serve(&["--transport", "framework", "--on-spare-full", "hold"]);
    let one_waits = |status: &StatusReport| status.messages.iter().any(|line| line.contains("wait (1 do)"));
    let mut guest = server.guest(1);
    server.fault(&["--ops", "write", "--sectors", "1000-1199"]);
    for slot in 0..16 {
        guest.write(1000 + 8 * slot, pattern(1000, 8, 2)).unwrap();
    }
    drop(guest);
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    let ring = &mut front_end.rings[0];
    chain(ring, 0, 1, 1128);
    ring.offer(0);
    server.await_status(one_waits);
    assert_eq!(ring.take(Duration::ZERO), None, "the write is held");
    assert_eq!(front_end.stop(0), 1);
    let ring = &mut front_end.rings[0];
    assert_eq!(ring.take(LIMIT), Some((0, 1)));
    assert_eq!(status(ring, 0), 1);
    // What comes in the next session is held as ever.
    front_end.start(0, 1);
    let ring = &mut front_end.rings[0];
    chain(ring, 0, 1, 1128);
    ring.offer(0);
    server.await_status(one_waits);
    server.no_faults();
    server.order(&["release", "1000-1007"]);
    assert_eq!(ring.take(LIMIT), Some((0, 1)));
    assert_eq!(status(ring, 0), 0);
    drop(front_end);
    server.stop();
}

/// `--fd` with a listening socket, and with one that is connected.
#[test]
fn an_inherited_socket_is_served() {
    for transport in TRANSPORTS {
        let volume = Volume::create(32, 64);
        let command = |socket: &dyn AsFd, transport| {
            fcntl_setfd(socket.as_fd(), FdFlags::empty()).unwrap();
            let fd = socket.as_fd().as_raw_fd().to_string();
            let ctl = volume.dir.path().join("vm.sock.ctl");
            let words = ["--fd", &fd, "--transport", transport, "--control-path", ctl.to_str().unwrap()];
            volume.command_without_socket(&words)
        };
        let listener = UnixListener::bind(volume.socket()).unwrap();
        let server = Server::start(command(&listener, transport), volume.dir.path()).unwrap();
        for _ in 0..2 {
            assert_eq!(server.guest(1).read(0, 1), Ok(vec![0; 512]));
        }
        server.stop();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let started = Server::start(command(&theirs, transport), volume.dir.path());
        drop(theirs);
        match (transport, started) {
            ("own", Ok(server)) => {
                let mut front_end = FrontEnd::over(ours, SETUP);
                read(&mut front_end.rings[0], 8);
                server.stop();
            }
            ("framework", Err(output)) => {
                let why = refusal(&output);
                assert!(why.contains("takes a listening one"), "{why}");
            }
            (_, started) => panic!("{transport}: {:?}", started.map(|server| server.announcement.clone())),
        }
    }
}

/// Chains on which `virtio-queue` and our walker differ. Drivers must not send them and the spec leaves to the device
/// what becomes of them (virtio 1.3 §2.7.5.2, §2.7.5.3.1), so the streams have none:
///
/// - An indirect descriptor with a next one. `virtio-queue` hands out what the table holds and never shows the
///   descriptor that refers to it, so that nobody above can see the flag.
/// - A table of more than 32768 entries, up to which `virtio-queue` counts as far as 65535.
/// - More than 4 GiB in one chain, at which `virtio-queue` ends as if the chain broke off. Ours goes on to the status.
#[test]
fn where_virtio_queue_and_our_walker_differ_is_known() {
    /// Its name, how it is written, and what used length and status ours and the other one give it.
    type Shape = (&'static str, fn(&Ring) -> Vec<Raw>, [(u32, u8); 2]);
    let shapes: [Shape; 3] = [
        (
            "an indirect descriptor with a next one",
            |ring| {
                let table = ring.area() + 0x1_0000;
                ring.table(table, &[(ring.area(), 16, NEXT, 1), (ring.area() + 16, 1, WRITE, 0)]);
                vec![(table, 32, INDIRECT | NEXT, 1)]
            },
            [(0, 0xff), (1, 0)],
        ),
        (
            "a table of 32769 entries",
            |ring| {
                let table = ring.area() + 0x1_0000;
                ring.table(table, &[(ring.area(), 16, NEXT, 32_768)]);
                ring.table(table + 32_768 * 16, &[(ring.area() + 16, 1, WRITE, 0)]);
                vec![(table, 32_769 * 16, INDIRECT, 0)]
            },
            [(0, 0xff), (1, 0)],
        ),
        (
            "more than 4 GiB",
            |ring| {
                let all = (ring.area() + 512, u32::MAX, NEXT | WRITE, 2);
                vec![(ring.area(), 16, NEXT, 1), all, (ring.area() + 16, 1, WRITE, 0)]
            },
            [(1, 1), (0, 0xff)],
        ),
    ];
    for (at, transport) in TRANSPORTS.into_iter().enumerate() {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&["--transport", transport]);
        let mut front_end = FrontEnd::connect(&server.socket, SETUP);
        for (name, shape, expected) in shapes {
            let ring = &mut front_end.rings[0];
            chain(ring, 0, 4, 0);
            for (index, descriptor) in (0..).zip(shape(ring)) {
                ring.descriptor(index, descriptor);
            }
            ring.offer(0);
            let (len, value) = expected[at];
            assert_eq!(ring.take(LIMIT), Some((0, len)), "{transport}: {name}");
            assert_eq!(status(ring, 0), value, "{transport}: {name}");
            read(ring, 8);
        }
        // What a refusal is in ours, which the daemon would answer with the end of the connection.
        assert_eq!(front_end.set_config(0, &[1]), transport == "framework");
        assert_eq!(front_end.config(0, 8), (32_u64 * 2048).to_le_bytes());
        read(&mut front_end.rings[1], 8);
        drop(front_end);
        server.stop();
    }
}
