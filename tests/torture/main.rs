//! Real kills: a guest writes sectors that say what they are through the real socket, the server is killed with
//! SIGKILL at moments that nothing knows beforehand, while blocks are being moved, and its successor has to have
//! everything that was answered (O1, W3), to answer what was not, once (O3), and to wait while the kernel still
//! has requests of the dead one (O4).
//!
//! `VHOST_REMAP_KILLS` says how many, `VHOST_REMAP_SEED` which servers, faults and requests. The moments are not
//! the seed's, and what a guest sends depends on what was answered: the same seed makes a run of the same kind, not
//! the same run. What a kill has met is read from memory and disk after it, and printed; a run that met too little
//! fails.
//!
//! - [`sector`] is what is written, [`expected`] what may be read.
//! - [`ring`] and [`workload`] are the driver, whose memory outlives the servers; [`trouble`] is what goes wrong.
//! - [`killer`] kills; [`spare`] sees from the spare what that has interrupted; [`slow_disk`] keeps I/O in the kernel.
//! - [`run`] puts them together, [`counts`] adds up.
//! - [`upgrade`] ends servers as an operator does who has a newer program.

mod counts;
mod expected;
#[expect(dead_code, reason = "of the driver that other tests use only reads are needed")]
#[path = "../process/guest.rs"]
mod guest;
mod killer;
#[expect(dead_code, reason = "only the dice are needed")]
#[path = "../process/model.rs"]
mod model;
#[expect(dead_code, reason = "the unit tests of the library use the rest")]
#[path = "../../src/vhost/testing/packed.rs"]
mod packed_ring;
mod ring;
mod run;
mod sector;
#[expect(dead_code, reason = "other tests have more to ask of a server")]
#[path = "../process/server.rs"]
mod server;
mod slow_disk;
mod spare;
mod trouble;
mod upgrade;
mod workload;

use std::io::{self, Write};

use slow_disk::SlowDisks;

/// Kills where nobody says how many.
const KILLS: u64 = 40;
const SEED: u64 = 1;

fn number(name: &str, default: u64) -> u64 {
    let Ok(text) = std::env::var(name) else { return default };
    text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is not a number"))
}

/// Says how to do it again when it fails.
struct Replay {
    kills: u64,
    seed: u64,
}

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Replay { kills, seed } = self;
            eprintln!("again: VHOST_REMAP_SEED={seed} VHOST_REMAP_KILLS={kills} cargo test --release --test torture");
        }
    }
}

#[test]
fn what_was_answered_survives_every_kill() {
    let replay = Replay { kills: number("VHOST_REMAP_KILLS", KILLS), seed: number("VHOST_REMAP_SEED", SEED) };
    run::say(format_args!("seed {}, {} kills", replay.seed, replay.kills));
    run::torture(replay.kills, replay.seed, |volume| {
        let disks = SlowDisks::export(&volume.primary, &volume.spare);
        let skip = |reason| writeln!(io::stdout(), "SKIP kills_with_io_in_the_kernel: {reason}");
        disks.map_err(skip).ok()
    });
}
