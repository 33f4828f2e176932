//! A Linux guest on a failing disk: what the contract promises, seen from where the user sits. Guests are
//! started by `vm-images/run`, one at a time; the server is the real program, and faults are
//! ordered as an operator orders them. Where no guest can be started, every test prints `SKIP vm: reason`.

mod area;
mod boot;
mod cloud_hypervisor;
mod full;
mod guest;
mod migrate;
mod resize;
mod server;
mod unreadable;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use area::Area;
use guest::{Guest, guests};
use server::Server;

/// Numbers that look random and are the same every time (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }
}

/// Writes to the file system's data, journal and inodes begin to fail for ever, and it does not notice.
fn check_file_system(kind: &str) {
    let Some(_turn) = guests() else { return };
    let server = Server::start("512M", 1);
    let mut guest = Guest::start(&server, "file_system.sh", &[kind], &[], Duration::from_secs(120));
    let areas: Vec<Area> = (0..3).map(|_| Area::parse(&guest.line())).collect();
    for area in &areas {
        area.fault(&server, &["--ops", "write"]);
    }
    guest.say("go");
    guest.finish();
    server.assert_unnoticed();
    let remapped = server.remapped();
    for area in &areas {
        assert!(remapped.iter().any(|sector| area.contains(*sector)), "nothing was remapped in the {}", area.name);
    }
}

#[test]
fn ext4_does_not_notice_writes_that_fail_in_data_journal_and_inodes() {
    check_file_system("ext4");
}

#[test]
fn xfs_does_not_notice_writes_that_fail_in_data_journal_and_inodes() {
    check_file_system("xfs");
}

/// Parts of the disk that `fio.sh` writes: one for each job.
const JOB_SECTORS: u64 = 2 * 2048;
/// They begin so far from each other.
const JOB_APART_SECTORS: u64 = 64 * 2048;
const JOBS: u64 = 4;

/// Sectors of one aligned block that one of the jobs uses.
fn block_in_use(dice: &mut Dice) -> u64 {
    dice.below(JOBS) * JOB_APART_SECTORS + dice.below(JOB_SECTORS / 8) * 8
}

/// Until told to stop: blocks fail writes for ever or a read once or twice, and now and then all is good again.
fn faults_come_and_go(server: &Server, dice: &mut Dice, stop: &AtomicBool) {
    for round in 1.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let start = block_in_use(dice);
        let sectors = format!("{start}-{}", start + 8 * (1 + dice.below(4)) - 1);
        match dice.below(3) {
            0 => server.fault(&["--ops", "read", "--count", "2", "--sectors", &sectors]),
            1 => server.fault(&["--ops", "write", "--partial", "--sectors", &sectors]),
            _ => server.fault(&["--ops", "write", "--sectors", &sectors]),
        }
        if round % 50 == 0 {
            server.vhost_remap("fault", &["clear"]);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn four_queues_keep_every_write_while_faults_come_and_go() {
    let Some(_turn) = guests() else { return };
    let server = Server::start("512M", 4);
    let mut guest = Guest::start(&server, "fio.sh", &["12"], &["--smp", "4"], Duration::from_secs(150));
    assert_eq!(guest.line(), "running on split rings");
    let mut dice = Dice(7);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| faults_come_and_go(&server, &mut dice, &stop));
        let _stop = StopOnDrop(&stop);
        guest.finish();
    });
    server.assert_unnoticed();
    let status = server.status();
    assert!(status.blocks.remapped > 0, "no write met a fault");
}

/// O3. `make torture` kills more often.
fn check_kills(mut server: Server, rings: &str, kills: u64) {
    let limit = Duration::from_secs(150 + 10 * kills);
    let mut guest = Guest::start(&server, "fio.sh", &[], &["--smp", "4"], limit);
    assert_eq!(guest.line(), format!("running on {rings} rings"));
    let mut dice = Dice(11);
    for _ in 0..kills {
        for _ in 0..8 {
            let start = block_in_use(&mut dice);
            server.fault(&["--ops", "write", "--sectors", &format!("{start}-{}", start + 31)]);
        }
        std::thread::sleep(Duration::from_millis(1500));
        // QEMU 7.2 never comes back to a server that ends while it sets up the connection.
        server.await_requests();
        server.kill();
        server.run();
    }
    guest.say("stop");
    guest.finish();
    server.assert_unnoticed();
    println!("{kills} kills under a guest, {} blocks remapped", server.remapped().len());
}

fn kills() -> u64 {
    std::env::var("VHOST_REMAP_VM_KILLS").map_or(4, |kills| kills.parse().expect("a number of kills"))
}

#[test]
fn a_server_killed_again_and_again_under_a_guest_is_not_noticed() {
    let Some(_turn) = guests() else { return };
    check_kills(Server::start("512M", 4), "split", kills());
}

#[test]
fn a_server_killed_under_a_guest_with_packed_rings_is_not_noticed() {
    let Some(_turn) = guests() else { return };
    check_kills(Server::start("512M", 4).with_packed_rings(), "packed", kills().div_ceil(2));
}

/// Sets `stop` however a scope is left, so that its thread ends and the failure is seen.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How a server ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// SIGTERM, the file system unmounted.
    Clean,
    /// SIGKILL, under load.
    Killed,
}

/// Files that the guest flushed are whole after the server has ended and begun again, remaps included.
fn check_restart(end: End) {
    let Some(_turn) = guests() else { return };
    let mut server = Server::start("256M", 1);
    // Some rewrites in place succeed and some do not.
    server.fault(&["--ops", "write", "--probability", "0.3", "--seed", "3"]);
    let how = if end == End::Clean { "clean" } else { "killed" };
    let mut guest = Guest::start(&server, "persist.sh", &["write", how], &[], Duration::from_secs(120));
    assert_eq!(guest.line(), "flushed");
    let remapped = server.remapped();
    assert!(!remapped.is_empty(), "no write met a fault");
    match end {
        End::Clean => {
            guest.say("go");
            guest.finish();
            server.assert_unnoticed();
            server.stop();
        }
        End::Killed => {
            std::thread::sleep(Duration::from_secs(1));
            server.kill();
            drop(guest);
        }
    }
    server.run();
    let again = server.remapped();
    assert!(remapped.iter().all(|sector| again.contains(sector)), "{remapped:?} shrank to {again:?}");
    Guest::start(&server, "persist.sh", &["check", how], &[], Duration::from_secs(120)).finish();
    server.assert_unnoticed();
}

#[test]
fn files_and_remaps_outlive_a_restart() {
    check_restart(End::Clean);
}

#[test]
fn flushed_files_and_remaps_outlive_a_kill() {
    check_restart(End::Killed);
}
