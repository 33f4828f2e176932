//! Everything at once: random chains on all queues, good ones and bad, while an operator asks, moves blocks and
//! makes devices fail, and the front-end interrupts rings, swaps memory and comes back.
//!
//! What is checked here is that each chain comes back once and in time, and that the server goes on and ends well;
//! what it does to the data the other tests say. It is there to be run with a server that looks for data races
//! (`ci/test tsan`), for longer: `STORM_ROUNDS=200`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use vhost_remap::control::client::Client;
use vhost_remap::device::DeviceIndex;
use vhost_remap::device::fault::{FaultOp, FaultRule};
use vhost_remap::units::{Sector, SectorRange};
use vmm_sys_util::eventfd::EventFd;

use crate::chains::Chains;
use crate::frontend::{F_EVENT_IDX, FrontEnd, Setup, area_of};
use crate::model::Random;
use crate::server::{Server, Volume};
use crate::transports::offer;

const MIB: u64 = 32;
const SLOTS: u32 = 256;
/// The part of the disk that everybody uses.
const HOT: (u64, u64) = (8192, 2048);
/// As many as guest memory has room for the buffers of.
const QUEUES: usize = 2;
/// Chains of a queue in a round.
const CHAINS: usize = 100;
const LIMIT: Duration = Duration::from_secs(60);

/// Counts a thread that drives a queue, and that it ends, whatever way.
struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An operator who asks without a pause.
fn ask(client: &Client, busy: &AtomicUsize) -> u64 {
    let mut answers = 0;
    while busy.load(Ordering::Relaxed) > 0 {
        for target in ["/v1/status", "/v1/faults", "/proc"] {
            client.get_text(target, LIMIT).unwrap();
        }
        client.get_text("/v1/list?limit=100", LIMIT).unwrap();
        client.get_text(&format!("/v1/events?after={answers}"), LIMIT).unwrap();
        answers += 5;
    }
    answers
}

/// An operator who changes things; some of it is refused, for good reasons.
fn change(client: &Client, random: &mut Random, busy: &AtomicUsize) -> u64 {
    let mut orders = 0;
    while busy.load(Ordering::Relaxed) > 0 {
        let start = HOT.0 + random.below(HOT.1 - 64);
        let range = json!({ "start": start, "count": 1 + random.below(64) });
        let post = |target: &str, document: &Value| drop(client.post::<Value>(target, document, LIMIT));
        match random.below(12) {
            0..3 => post("/v1/remap", &range),
            3..6 => post("/v1/release", &range),
            6 => post("/v1/save", &json!({})),
            7 => post("/v1/clear", &json!({})),
            8 => drop(client.delete::<Value>("/v1/faults", LIMIT)),
            _ => drop(client.post::<Value>("/v1/faults", &fault(random, start), LIMIT)),
        }
        orders += 1;
    }
    orders
}

fn fault(random: &mut Random, start: u64) -> FaultRule {
    use FaultOp::{Flush, Read, Write};
    let (times, range) = (1 + random.below(4), SectorRange { start: Sector(start), count: 1 + random.below(32) });
    let rule = |device, ops: &[FaultOp]| FaultRule { count: Some(times), ..FaultRule::new(device, ops) };
    let (primary, spare) = (DeviceIndex::PRIMARY, DeviceIndex::SPARE);
    match random.below(8) {
        0 => FaultRule { count: Some(1), ..rule(primary, &[Flush]) },
        1 => FaultRule { count: Some(1), ..rule(spare, &[Flush]) },
        2 => rule(spare, &[Write]),
        3 => FaultRule { range: Some(range), ..rule(primary, &[Read]) },
        4 => FaultRule { range: Some(range), errno: None, delay_ms: 2, ..rule(primary, &[Read, Write]) },
        _ => FaultRule { range: Some(range), ..rule(primary, &[Read, Write]) },
    }
}

/// What the front-end does with rings and memory in use; the number of times.
fn interfere(front_end: &mut FrontEnd, events: &[(EventFd, EventFd)], random: &mut Random, busy: &AtomicUsize) -> u64 {
    let mut times = 0;
    while busy.load(Ordering::Relaxed) > 0 {
        let queue = usize::try_from(random.below(QUEUES as u64)).expect("small");
        match random.below(6) {
            0 | 1 => front_end.interrupt(queue, &events[queue]),
            2 => {
                front_end.enable(queue, false);
                front_end.enable(queue, true);
            }
            3 => front_end.lend_memory(),
            4 => front_end.swap_memory(),
            _ => {
                let cache = u8::try_from(random.below(2)).expect("a bit");
                assert!(front_end.set_config(32, &[cache]));
                assert_eq!(front_end.config(32, 1), [cache]);
            }
        }
        times += 1;
    }
    times
}

/// A round with one front-end: answered chains, questions, orders, interruptions.
fn round(server: &Server, seed: u64) -> [u64; 4] {
    let without = if seed.is_multiple_of(2) { 0 } else { F_EVENT_IDX };
    let setup = Setup { queues: QUEUES, size: 32, without };
    let mut front_end = FrontEnd::connect(&server.socket, setup);
    let mut rings = std::mem::take(&mut front_end.rings);
    let events: Vec<_> = rings.iter().map(|ring| ring.events()).collect();
    let busy = AtomicUsize::new(QUEUES);
    let client = || Client::new(&server.ctl).expect("an event loop");
    let met = std::thread::scope(|scope| {
        for (queue, ring) in rings.iter_mut().enumerate() {
            let (random, area) = (Random(seed << 8 | queue as u64), area_of(queue));
            let mut chains = Chains { random, area, size: 32, indirect: true, sectors: HOT, capacity: MIB * 2048 };
            let busy = Busy(&busy);
            scope.spawn(move || {
                let _busy = busy;
                (0..CHAINS).for_each(|_| drop(offer(ring, &chains.next())));
            });
        }
        let asker = scope.spawn(|| ask(&client(), &busy));
        let operator = scope.spawn(|| change(&client(), &mut Random(seed ^ 0x0bed), &busy));
        let times = interfere(&mut front_end, &events, &mut Random(seed ^ 0xfeed), &busy);
        [(QUEUES * CHAINS) as u64, asker.join().unwrap(), operator.join().unwrap(), times]
    });
    // Or without a word.
    if seed.is_multiple_of(3) {
        front_end.reset();
    }
    met
}

/// Nothing fails any more; devices that were given up are used again, and a failed flush has been looked at.
fn mend(server: &Server) {
    server.no_faults();
    let gone = ["spare-down", "primary-gone"];
    let back = server.await_status(|status| !status.state.iter().any(|state| gone.contains(&state.as_str())));
    if back.state.iter().any(|state| state == "poisoned") {
        server.order(&["clear"]);
    }
}

fn storm(options: &[&str], rounds: u64) {
    let volume = Volume::create(MIB, SLOTS);
    let options = [options, &["--workers", "2"]].concat();
    let mut server = volume.serve(&options);
    let mut met = [0; 4];
    for number in 0..rounds {
        let of_round = round(&server, number);
        met.iter_mut().zip(of_round).for_each(|(met, more)| *met += more);
        mend(&server);
        match number % 4 {
            1 => server.kill(),
            3 => server.stop(),
            _ => continue,
        }
        server = volume.serve(&options);
        mend(&server);
    }
    println!("{options:?}: chains, questions, orders, interruptions: {met:?}");
    server.stop();
}

#[test]
fn everything_at_once_ends_well() {
    let rounds = std::env::var("STORM_ROUNDS").map_or(4, |rounds| rounds.parse().expect("a number"));
    storm(&["--io-engine", "threads"], rounds);
    storm(&[], rounds);
}
