//! A newer program takes over from the server of a running guest, which sees a pause and nothing else (O3).

use std::fs;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;

use crate::expected::Expected;
use crate::killer::{Killed, Killer, When};
use crate::model::Random;
use crate::sector::{Run, Stamp};
use crate::server::{Server, Starting, Volume};
use crate::workload::{Io, Workload};

const UPGRADES: u64 = 6;
/// Clear of what a probe of the device reads.
const AREA: Range<u64> = 16_384..20_480;
/// The fewest a volume can have.
const SLOTS: u32 = 16;
const LIMIT: Duration = Duration::from_secs(30);

/// Start a program on a listening socket that others have too. It waits for a volume that another one serves.
fn start(program: &Path, volume: &Volume, listener: &UnixListener, dir: &Path) -> Starting {
    let mut command = Command::new(program);
    command.arg("serve").arg("--primary").arg(&volume.primary).arg("--fault-injection");
    command.args(["--lock-wait", "60", "--on-spare-full", "hold"]);
    command.arg("--fd").arg(listener.as_raw_fd().to_string()).arg("--control-path").arg(dir.join("vm.sock.ctl"));
    Starting::spawn(command, dir)
}

/// More bad blocks than there are slots, so that there are always writes that wait for one; and devices that take
/// their time.
fn trouble(server: &Server, random: &mut Random) {
    for _ in 0..8 {
        let first = AREA.start + random.below(AREA.end - AREA.start - 48);
        let sectors = format!("{first}-{}", first + random.below(48));
        server.fault(&["--ops", "write", "--sectors", &sectors]);
    }
    let seed = random.below(1000).to_string();
    server.fault(&["--ops", "read,write", "--delay", "3", "--probability", "0.4", "--seed", &seed]);
    server.fault(&["--device", "spare", "--ops", "write,flush", "--delay", "8", "--probability", "0.8"]);
}

fn request(sequence: &mut u64, queue: usize, random: &mut Random) -> Io {
    let start = AREA.start + random.below(AREA.end - AREA.start - 64);
    let sectors = start..start + 1 + random.below(63);
    *sequence += 1;
    match random.below(32) {
        0 => Io::Flush,
        1 => Io::Zero(sectors, false),
        2..10 => Io::Read(sectors),
        _ => Io::Write(sectors, Stamp::new(*sequence, queue)),
    }
}

#[test]
fn a_newer_program_takes_over_from_the_server_of_a_running_guest() {
    let volume = Volume::create(32, SLOTS);
    let listener = UnixListener::bind(volume.socket()).unwrap();
    fcntl_setfd(&listener, FdFlags::empty()).unwrap();
    let mut random = Random(9);
    let (mut guest, mut expected) = (Workload::new(3, true, true, false), Expected::zeros(Run(9), AREA));
    let (mut sequence, mut left) = (0, 0);
    let folder = || tempfile::tempdir_in(volume.dir.path()).unwrap();
    let mut dir = folder();
    let first = start(env!("CARGO_BIN_EXE_vhost-remap").as_ref(), &volume, &listener, dir.path());
    let mut server = first.wait().unwrap_or_else(|output| panic!("{output:?}"));
    let mut resubmitting = 0;
    for _ in 0..UPGRADES {
        let killer = Killer::arm(server.pid(), Signal::TERM, None);
        guest.connect(&volume.socket(), &killer).expect("nobody stops it");
        // What the server before has left, this one answers, once.
        guest.drive(&killer, &mut expected, &mut random, |_, _| None).expect("nobody stops it");
        resubmitting += u64::from(server.log_text().contains("requests are resubmitted"));
        server.ask(&["release", &format!("{}-{}", AREA.start, AREA.end - 1)]);
        trouble(&server, &mut random);

        let newer_dir = folder();
        let program = newer_dir.path().join("vhost-remap");
        fs::copy(env!("CARGO_BIN_EXE_vhost-remap"), &program).unwrap();
        let newer = start(&program, &volume, &listener, newer_dir.path());
        let deadline = Instant::now() + LIMIT;
        while !newer.server.log_text().contains("waiting up to") {
            assert!(Instant::now() < deadline, "it does not wait for the volume: {}", newer.server.log_text());
            std::thread::sleep(Duration::from_millis(10));
        }
        killer.order(When { after: Duration::from_millis(150 + random.below(200)), hold_before: None });
        let work = |queue: usize, random: &mut Random| Some(request(&mut sequence, queue, random));
        let Err(Killed) = guest.drive(&killer, &mut expected, &mut random, work) else {
            panic!("there is always more")
        };
        server.stop();
        killer.join();
        let mut unread = Vec::new();
        guest.take_answers(&mut expected, &mut unread);
        assert_eq!(unread, []);
        left += guest.in_flight_at(Instant::now());
        server = newer.wait().unwrap_or_else(|output| panic!("{output:?}"));
        dir = newer_dir;
    }
    let killer = Killer::arm(server.pid(), Signal::TERM, None);
    guest.connect(&volume.socket(), &killer).expect("nobody stops it");
    let mut reads = AREA.step_by(64).map(|start| Io::Read(start..start + 64));
    let unread = guest.drive(&killer, &mut expected, &mut random, |_, _| reads.next()).expect("nobody stops it");
    assert_eq!(unread, []);
    killer.join();
    assert!(left > 0 && resubmitting > 0, "too little was under way: {left}, {resubmitting}");
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.lifetime.guest_errors), (u64::from(SLOTS), 0));
    server.stop();
    drop(dir);
}
