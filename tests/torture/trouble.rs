//! What goes wrong while the guest works: bad sectors, slots that fail, slow devices, and an operator who moves
//! blocks to and fro.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;
use vhost_remap::control::api::{Done, Sectors};
use vhost_remap::control::client::{Client, ClientError};
use vhost_remap::device::DeviceIndex;
use vhost_remap::device::fault::{FaultOp, FaultRule};
use vhost_remap::units::{Block, Sector, SectorRange, Slot};
use vhost_remap::volume::layout::{Layout, Place};

use crate::model::Random;
use crate::spare::Look;
use crate::workload::SECTORS_MAX;

/// Longest an order may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Sectors in a block.
const BLOCK: u64 = 8;

/// The faults of one server's life.
#[derive(Default)]
pub(crate) struct Trouble {
    rules: Vec<FaultRule>,
    /// Those of `bad`.
    bad_writes: Vec<FaultRule>,
    /// Where writes fail.
    pub(crate) bad: Vec<Range<u64>>,
    /// Where reads fail.
    pub(crate) unreadable: Vec<Range<u64>>,
}

fn rule(device: DeviceIndex, ops: &[FaultOp], sectors: &Range<u64>) -> FaultRule {
    let range = SectorRange { start: Sector(sectors.start), count: sectors.end - sectors.start };
    FaultRule { range: Some(range), ..FaultRule::new(device, ops) }
}

fn delay(device: DeviceIndex, ops: &[FaultOp], delay_ms: u64, probability: f64, seed: u64) -> FaultRule {
    FaultRule { errno: None, delay_ms, probability, seed, ..FaultRule::new(device, ops) }
}

fn stretch(random: &mut Random, area: &Range<u64>, longest: u64) -> Range<u64> {
    let len = 1 + random.below(longest);
    let start = area.start + random.below(area.end - area.start - len);
    start..start + len
}

fn with_neighbours(sectors: &Range<u64>, area: &Range<u64>) -> Range<u64> {
    sectors.start.saturating_sub(BLOCK).max(area.start)..(sectors.end + BLOCK).min(area.end)
}

impl Trouble {
    /// Faults in `area`, and of the slots that will be taken next.
    pub(crate) fn make(random: &mut Random, area: &Range<u64>, layout: &Layout, look: &Look) -> Trouble {
        let mut trouble = Trouble::default();
        let (primary, spare) = (DeviceIndex::PRIMARY, DeviceIndex::SPARE);
        for _ in 0..6 + random.below(8) {
            let bad = stretch(random, area, 6 * BLOCK);
            let mut rule = rule(primary, &[FaultOp::Write], &bad);
            match random.below(6) {
                0 => rule.partial = true,
                // Written again in place, that once or for good.
                1 => rule.count = Some(1 + random.below(3)),
                _ => {}
            }
            trouble.bad_writes.push(rule);
            trouble.bad.push(bad);
        }
        if random.below(3) == 0 {
            // Where writes fail too, sectors get lost.
            let unreadable = match random.below(2) {
                0 => stretch(random, area, BLOCK),
                _ => stretch(random, &with_neighbours(&trouble.bad[0], area), BLOCK),
            };
            let rule = rule(primary, &[FaultOp::Read], &unreadable);
            trouble.rules.push(FaultRule { until_rewritten: true, ..rule });
            trouble.unreadable.push(unreadable);
        }
        let of_slot = |slot: Slot| {
            let start = layout.slots_start / 512 + u64::from(slot.0) * BLOCK;
            start..start + BLOCK
        };
        if random.below(4) == 0 {
            // One of those that are taken next.
            let slot = look.free[..8][usize::try_from(random.below(8)).expect("small")];
            trouble.rules.push(rule(spare, &[FaultOp::Write], &of_slot(slot)));
        }
        let inside = |block: Block| area.contains(&(block.0 * BLOCK));
        let live: Vec<_> = look.live.iter().filter(|(block, _)| inside(*block)).collect();
        if random.below(3) == 0 && !live.is_empty() {
            // One in use: what was written there is lost but for what is written anew.
            let (block, slot) = live[usize::try_from(random.below(live.len() as u64)).expect("small")];
            let sectors = block.0 * BLOCK..(block.0 + 1) * BLOCK;
            trouble.rules.push(rule(spare, &[FaultOp::Read, FaultOp::Write], &of_slot(*slot)));
            trouble.bad.push(sectors.clone());
            trouble.unreadable.push(sectors);
        }
        let (slow, slower) = (1 + random.below(4), 2 + random.below(6));
        trouble.rules.push(delay(primary, &[FaultOp::Read, FaultOp::Write, FaultOp::Flush], slow, 0.4, random.next()));
        trouble.rules.push(delay(spare, &[FaultOp::Write], slow, 0.5, random.next()));
        // The map most of all: the answer waits for it.
        for place in Place::ALL {
            let start = layout.place_start(place) / 512;
            let range = SectorRange { start: Sector(start), count: layout.place_len() / 512 };
            let rule = delay(spare, &[FaultOp::Write], slower, 0.9, random.next());
            trouble.rules.push(FaultRule { range: Some(range), ..rule });
        }
        trouble.rules.push(delay(spare, &[FaultOp::Flush], slower, 0.8, random.next()));
        trouble
    }

    /// What the server is to be told; with the writes that fail, unless its disk sees to that.
    pub(crate) fn rules(&self, bad_writes: bool) -> Vec<FaultRule> {
        let mut rules = self.rules.clone();
        if bad_writes {
            rules.extend_from_slice(&self.bad_writes);
        }
        rules
    }

    /// Sectors for a request of so many: often where it hurts.
    pub(crate) fn aim(&self, random: &mut Random, area: &Range<u64>) -> Range<u64> {
        let len = match random.below(8) {
            0 => 1,
            1 | 2 => BLOCK,
            3..6 => 1 + random.below(3 * BLOCK),
            6 => 1 + random.below(64),
            _ => 1 + random.below(SECTORS_MAX),
        };
        let mut start = area.start + random.below(area.end - area.start - len);
        if random.below(2) == 0 && !self.bad.is_empty() {
            let bad = &self.bad[usize::try_from(random.below(self.bad.len() as u64)).expect("small")];
            start = (bad.start + random.below(bad.end - bad.start)).saturating_sub(random.below(len));
        }
        if len == BLOCK {
            start = start / BLOCK * BLOCK;
        }
        let start = start.clamp(area.start, area.end - len);
        start..start + len
    }
}

/// An operator who gives orders until the server is gone.
pub(crate) struct Operator {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Operator {
    /// First of all the rules.
    pub(crate) fn begin(ctl: &Path, rules: Vec<FaultRule>, area: &Range<u64>, mut random: Random) -> Operator {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let (server, area) = (Client::new(ctl).expect("an event loop"), area.clone());
        let thread = std::thread::spawn(move || {
            for rule in rules {
                match server.post::<Value>("/v1/faults", &rule, LIMIT) {
                    Err(error @ ClientError::Refused { .. }) => panic!("{rule:?}: {error}"),
                    Err(_) => return,
                    Ok(_) => {}
                }
            }
            while !stopped.load(Ordering::Acquire) {
                let (order, longest) = if random.below(3) == 0 { ("remap", 64) } else { ("release", 2048) };
                let Range { start, end } = stretch(&mut random, &area, longest);
                // Refused as often as not: there is nothing to release, or it lies on bad sectors.
                let result =
                    server.post::<Done>(&format!("/v1/{order}"), &Sectors { start, count: end - start }, LIMIT);
                match result {
                    Ok(_) | Err(ClientError::Refused { .. }) => {}
                    // The server is gone.
                    Err(_) => return,
                }
                std::thread::sleep(Duration::from_millis(random.below(12)));
            }
        });
        Operator { stop, thread }
    }

    /// After the kill.
    pub(crate) fn end(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("it ends by itself");
    }
}
