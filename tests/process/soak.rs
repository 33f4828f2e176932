//! Random requests against random faults and restarts, and a model that knows what each sector may hold.
//!
//! Invariants: a read that succeeds returns, for every sector, the last write that was answered with success
//! or one that failed after it (R1, W7), and the same as the reads before it. Without faults, what does not
//! read is on the list of lost sectors (P2), and what was rewritten reads.

use std::collections::BTreeSet;

use crate::guest::{Failed, Guest, Io};
use crate::model::{Random, pattern};
use crate::server::{Server, Volume};

const START: u64 = 16_384;
const SECTORS: u64 = 2048;
/// Requests of one batch, which do not overlap: each stays in a stripe of its own.
const STRIPES: u64 = 8;
const ROUNDS: u64 = 12;

/// What a sector may hold, by the stamps of its writes; 0 is a new volume's zeros.
#[derive(Clone)]
struct Sector {
    /// Since the last write that succeeded.
    possible: Vec<u64>,
    /// Of these, what has not been excluded by a read since the server started.
    now: Vec<u64>,
}

struct Soak {
    random: Random,
    sectors: Vec<Sector>,
    stamp: u64,
    /// Of all runs: blocks moved, rewritten, sectors lost, requests failed.
    met: [u64; 4],
}

fn content(sector: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 { vec![0; 512] } else { pattern(sector, 1, stamp) }
}

impl Soak {
    fn sector(&mut self, sector: u64) -> &mut Sector {
        &mut self.sectors[usize::try_from(sector - START).unwrap()]
    }

    fn request(&mut self, stripe: u64) -> Io {
        let len = SECTORS / STRIPES;
        let count = match self.random.below(4) {
            0 => 1,
            1 => 8,
            2 => 1 + self.random.below(24),
            _ => 1 + self.random.below(len),
        };
        let mut sector = START + stripe * len + self.random.below(len - count + 1);
        if count == 8 {
            sector = sector / 8 * 8;
        }
        match self.random.below(16) {
            0..6 => Io::Read { sector, count },
            6..15 => {
                self.stamp += 1;
                Io::Write { sector, data: pattern(sector, count, self.stamp) }
            }
            _ => Io::WriteZeroes(vec![(sector, u32::try_from(count).unwrap(), 0)]),
        }
    }

    /// Take in what a request came to.
    fn note(&mut self, io: &Io, reply: &Result<Vec<u8>, Failed>) {
        let (start, count, stamp) = match io {
            Io::Read { sector, count } => (*sector, *count, None),
            Io::Write { sector, data } => {
                let stamp = u64::from_le_bytes(data[8..16].try_into().unwrap());
                (*sector, data.len() as u64 / 512, Some(stamp))
            }
            Io::WriteZeroes(segments) => (segments[0].0, u64::from(segments[0].1), Some(0)),
            _ => return,
        };
        match (stamp, reply) {
            (Some(stamp), Ok(_)) => {
                for sector in start..start + count {
                    *self.sector(sector) = Sector { possible: vec![stamp], now: vec![stamp] };
                }
            }
            (Some(stamp), Err(failed)) => {
                assert_eq!(*failed, Failed::IoErr);
                for sector in start..start + count {
                    let state = self.sector(sector);
                    state.possible.push(stamp);
                    state.now.push(stamp);
                }
            }
            (None, Ok(data)) => {
                for (sector, found) in (start..).zip(data.chunks(512)) {
                    let state = self.sector(sector);
                    let stamp = state.now.iter().copied().find(|stamp| found == content(sector, *stamp));
                    let Some(stamp) = stamp else {
                        panic!("{io:?}: sector {sector} has {:x?}, may have {:?}", &found[..16], state.now)
                    };
                    state.now = vec![stamp];
                }
            }
            (None, Err(failed)) => assert_eq!(*failed, Failed::IoErr),
        }
    }

    fn batches(&mut self, guest: &mut Guest, count: u64) {
        for batch in 0..count {
            let ios: Vec<Io> = (0..STRIPES).map(|stripe| self.request(stripe)).collect();
            let queue = usize::try_from(batch % 2).unwrap();
            guest.queues[queue].shape.skew = [0, 512, 4][usize::try_from(batch % 3).unwrap()];
            let replies = guest.queues[queue].run(&ios);
            for (io, reply) in ios.iter().zip(&replies) {
                self.note(io, reply);
            }
        }
    }

    /// A few rules that a contract covers: bad media on the primary, and slots that fail.
    fn faults(&mut self, server: &Server, slots_start: u64) {
        for _ in 0..3 + self.random.below(6) {
            let first = START + self.random.below(SECTORS - 16);
            let last = first + self.random.below(16);
            let range = format!("{first}-{last}");
            let seed = self.random.next().to_string();
            let words: &[&str] = match self.random.below(10) {
                9 => {
                    // A block that takes no write and gives only a part of its content.
                    let block = format!("{}-{}", first / 8 * 8, last / 8 * 8 + 7);
                    server.fault(&["--ops", "write", "--sectors", &block]);
                    &["--ops", "read", "--sectors", &range]
                }
                0 | 1 => &["--ops", "write", "--sectors", &range],
                2 => &["--ops", "write", "--sectors", &range, "--partial"],
                3 => &["--ops", "read", "--sectors", &range],
                4 => &["--ops", "read", "--sectors", &range, "--until-rewritten"],
                5 => &["--ops", "read,write", "--sectors", &range, "--count", "3"],
                6 => &["--ops", "read,write", "--sectors", &range, "--probability", "0.5", "--seed", &seed],
                7 => &["--ops", "read,write", "--sectors", &range, "--delay", "3"],
                _ => {
                    let slot = slots_start + self.random.below(300) * 8;
                    let ops = ["read", "write", "read,write"][usize::try_from(self.random.below(3)).unwrap()];
                    let range = format!("{slot}-{}", slot + self.random.below(8));
                    server.fault(&["--device", "spare", "--ops", ops, "--sectors", &range]);
                    continue;
                }
            };
            server.fault(words);
        }
    }

    fn note_run(&mut self, server: &Server) {
        let counters = server.status().counters;
        let now = [counters.remaps, counters.rewritten, counters.lost, counters.guest_errors];
        self.met.iter_mut().zip(now).for_each(|(met, now)| *met += now);
    }

    /// Without faults: everything reads but what is listed as lost.
    fn check_healthy(&mut self, server: &Server, guest: &mut Guest) {
        server.no_faults();
        let reads: Vec<Io> = (START..START + SECTORS).map(|sector| Io::Read { sector, count: 1 }).collect();
        let replies = guest.queue().run(&reads);
        let mut failed = BTreeSet::new();
        for (io, reply) in reads.iter().zip(&replies) {
            if let (Io::Read { sector, .. }, Err(_)) = (io, reply) {
                failed.insert(*sector);
            }
            self.note(io, reply);
        }
        let lost: BTreeSet<u64> = server.list().into_iter().flat_map(|entry| entry.lost).collect();
        assert_eq!(failed, lost, "what fails without a fault is lost, and nothing else");
    }
}

/// Soak one volume; what it met.
fn soak(seed: u64) -> [u64; 4] {
    println!("seed {seed}");
    let zeros = Sector { possible: vec![0], now: vec![0] };
    let sectors = vec![zeros; usize::try_from(SECTORS).unwrap()];
    let mut soak = Soak { random: Random(seed), sectors, stamp: 0, met: [0; 4] };
    let volume = Volume::create(32, 1024);
    // The place at the head of this spare is 1 MiB.
    let slots_start = 2048;
    let options: &[&str] = match seed % 5 {
        0 => &["--transport", "framework"],
        2 | 4 => &[],
        _ => &["--io-engine", "threads"],
    };
    let mut server = volume.serve(options);
    for round in 0..ROUNDS {
        let mut guest = server.guest(2);
        soak.batches(&mut guest, 4);
        soak.faults(&server, slots_start);
        soak.batches(&mut guest, 12);
        guest.flush().unwrap();
        soak.batches(&mut guest, 2);
        if round % 3 == 2 {
            soak.check_healthy(&server, &mut guest);
        }
        drop(guest);
        let end = soak.random.below(4);
        if end < 2 {
            soak.note_run(&server);
        }
        match end {
            0 => server.stop(),
            1 => server.kill(),
            _ => continue,
        }
        soak.sectors.iter_mut().for_each(|sector| sector.now.clone_from(&sector.possible));
        server = volume.serve(options);
    }
    let mut guest = server.guest(2);
    soak.check_healthy(&server, &mut guest);
    assert_eq!(server.status().state, ["ok"]);
    // Rewritten, nothing is lost any more.
    for sector in (START..START + SECTORS).step_by(256) {
        soak.stamp += 1;
        let io = Io::Write { sector, data: pattern(sector, 256, soak.stamp) };
        let reply = guest.queue().one(io.clone());
        reply.as_ref().unwrap();
        soak.note(&io, &reply);
    }
    soak.check_healthy(&server, &mut guest);
    assert_eq!(server.status().blocks.lost_sectors, 0);
    soak.note_run(&server);
    println!("moved, rewritten, lost, failed: {:?}", soak.met);
    soak.met
}

#[test]
fn random_requests_faults_and_restarts_agree_with_a_model() {
    if let Ok(seed) = std::env::var("SEED") {
        soak(seed.parse().expect("SEED is a number"));
        return;
    }
    let met = (1..=5).map(soak).reduce(|a, b| std::array::from_fn(|i| a[i] + b[i])).expect("a seed");
    assert!(met.iter().all(|met| *met > 0), "a soak that met no trouble proves nothing: {met:?}");
}
