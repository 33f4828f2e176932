//! What the rules of health remember, and what they do not.

use vhost_remap::device::DeviceIndex;
use vhost_remap::engine::event::EventKind;
use vhost_remap::engine::healer::Order;
use vhost_remap::engine::health::HealthState;
use vhost_remap::engine::request::Status;
use vhost_remap::volume::sidecar::SavedCounters;
use vhost_remap::volume::superblock::Seat as PageSeat;

use crate::commits::{BLOCK_A, BLOCK_B, SMALL, begun, new};
use crate::engine::Engine;
use crate::rig::{BLOCK, Bad, EPOCH, PRIMARY, Reads, Rig, SPARE};
use crate::scan::{made, unreadable};
use crate::seat::{Kind, Seat, seats};

const DAY: u64 = 86_400;
const TODAY: u64 = EPOCH / DAY;

/// Blocks that moved, by day.
fn days(engine: &mut Engine, rig: &mut Rig) -> Vec<(u64, u64)> {
    engine.status(rig).days.iter().map(|day| (day.day, day.remaps)).collect()
}

/// The state, and the rules that hold with their numbers.
fn judged(engine: &mut Engine, rig: &mut Rig) -> (HealthState, Vec<(&'static str, u64)>) {
    let health = engine.status(rig).health;
    (health.state, health.findings.iter().map(|finding| (finding.rule, finding.value)).collect())
}

/// Which device's state changed, and how.
fn changes(engine: &Engine) -> Vec<(Option<DeviceIndex>, &str)> {
    let of_health = engine.events.iter().filter(|event| event.kind == EventKind::Health);
    of_health.map(|event| (event.device, event.action.split(": ").next().unwrap())).collect()
}

fn counters(rig: &Rig) -> impl Iterator<Item = (Seat, SavedCounters)> {
    let set = rig.shape.create_params().set;
    let of_counters = seats(&rig.shape).into_iter().filter(|seat| seat.kind == Kind::Counters);
    of_counters.map(move |seat| {
        let place = PageSeat::Spare(seat.at.place().expect("counters are on the spare"));
        (seat, SavedCounters::decode(&seat.read(rig), set, place).expect("a whole page"))
    })
}

#[test]
fn what_failed_on_a_day_is_remembered_over_restarts_and_forgotten_after_70_days() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    // One block lives in a slot by an operator's order, which says nothing of the disk.
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::Ok, vec![]));
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, vec![("remapped-recently", 1)]));
    engine.pass(&mut rig, DAY).unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_B * BLOCK, &new(BLOCK_B)), Ok(Status::Ok));
    assert_eq!(days(&mut engine, &mut rig), [(TODAY, 1), (TODAY + 1, 1)]);
    engine.close(&mut rig).unwrap().unwrap();
    // The clock of the rig begins anew: what came after is today's.
    let mut engine = rig.open().unwrap();
    assert_eq!(days(&mut engine, &mut rig), [(TODAY, 2)]);
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, vec![("remapped-recently", 2)]));
    assert_eq!(engine.causes("health"), [] as [&str; 0], "nothing has changed by a restart");
    engine.pass(&mut rig, 69 * DAY).unwrap();
    assert_eq!(judged(&mut engine, &mut rig).0, HealthState::AtRisk);
    engine.pass(&mut rig, DAY).unwrap();
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::Ok, vec![]));
    assert_eq!(engine.causes("health"), ["no rule holds any more"]);
}

/// What is known to be bad is no news to a later pass.
#[test]
fn ten_blocks_that_a_pass_finds_bad_are_a_burst_once() {
    let mut rig = made(SMALL);
    rig.bad = (0..10).map(|n| unreadable(PRIMARY, n * 5 * 4096, 512, Reads::Never)).collect();
    let mut engine = rig.open().unwrap();
    assert!(engine.scan(&mut rig).complete);
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, vec![("error-burst", 10), ("pending", 10)]));
    engine.pass(&mut rig, 700).unwrap();
    assert!(engine.scan(&mut rig).complete);
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::Watch, vec![("pending", 10)]));
}

#[test]
fn a_change_of_health_is_told_once_with_the_rule_and_the_numbers() {
    let mut rig = begun(SMALL);
    rig.bad.push(Bad { device: PRIMARY, from: 0, to: 512, reads: Reads::Never, writes: false });
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.read(&mut rig, 0, 1), None);
    let pending = "rule pending: blocks whose last read failed: 1 (from 1 on)";
    assert_eq!(engine.causes("health"), [pending]);
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    let moved = "rule remapped-recently: blocks moved in the last 70 days because they failed: 1 (from 1 on)";
    assert_eq!(engine.causes("health"), [pending, moved]);
    assert_eq!(changes(&engine), [(Some(PRIMARY), "OK -> WATCH"), (Some(PRIMARY), "WATCH -> AT_RISK")]);
    // More of the same is no change.
    assert_eq!(engine.write(&mut rig, BLOCK_B * BLOCK, &new(BLOCK_B)), Ok(Status::Ok));
    assert_eq!(engine.causes("health").len(), 2);
}

/// What the scanner keeps, as of one that has ended passes and has none under way. The last is of slots in use, of
/// which there is one.
fn scanner_words() -> [u64; 32] {
    std::array::from_fn(|at| match at {
        1 | 17..31 => 77,
        31 => 1,
        _ => 0,
    })
}

/// A process that is killed has lost what came in the last minute.
#[test]
fn the_days_are_kept_with_the_counters_and_what_others_keep_there_stays() {
    let mut rig = begun(SMALL);
    let set = rig.shape.create_params().set;
    for (seat, mut saved) in counters(&rig).collect::<Vec<_>>() {
        saved.values.resize(48, 0);
        saved.values[16..48].copy_from_slice(&scanner_words());
        seat.write(&rig, &saved.encode(set, PageSeat::Spare(seat.at.place().unwrap())));
    }
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    engine.pass(&mut rig, 60).unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_B * BLOCK, &new(BLOCK_B)), Ok(Status::Ok));
    drop(engine);
    rig.kill();
    for (_, saved) in counters(&rig) {
        assert_eq!((saved.values.len(), &saved.values[16..48]), (256, &scanner_words()[..]));
    }
    let mut engine = rig.open().unwrap();
    assert_eq!(days(&mut engine, &mut rig), [(TODAY, 1)]);
    engine.done(&mut rig, Order::Save);
    assert!(counters(&rig).all(|(_, saved)| saved.values[16..48] == scanner_words()));
}

#[test]
fn a_flush_that_failed_is_not_forgotten_by_clearing_it() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, 0, &new(0)), Ok(Status::Ok));
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    let failed = (HealthState::Replace, vec![("flush-failed", 1)]);
    assert_eq!(judged(&mut engine, &mut rig), failed);
    engine.done(&mut rig, Order::Clear);
    assert_eq!(judged(&mut engine, &mut rig), failed);
    engine.close(&mut rig).unwrap().unwrap();
    let mut engine = rig.open().unwrap();
    assert_eq!(judged(&mut engine, &mut rig), failed);
}

#[test]
fn a_burst_is_one_of_requests_and_not_of_what_is_tried_again() {
    let mut rig = begun(SMALL);
    rig.bad.push(Bad { device: PRIMARY, from: 100 * 4096, to: 110 * 4096, reads: Reads::Never, writes: false });
    let mut engine = rig.open().unwrap();
    let has_burst =
        |engine: &mut Engine, rig: &mut Rig| judged(engine, rig).1.into_iter().find(|(rule, _)| *rule == "error-burst");
    for block in 100..109 {
        assert_eq!(engine.read(&mut rig, block * BLOCK, 1), None);
    }
    let errors = engine.status(&mut rig).errors[0][0];
    assert!(errors > 20, "{errors} failed reads: each was tried again");
    assert_eq!(has_burst(&mut engine, &mut rig), None);
    assert_eq!(engine.read(&mut rig, 109 * BLOCK, 1), None);
    assert_eq!(has_burst(&mut engine, &mut rig), Some(("error-burst", 10)));
    engine.pass(&mut rig, 601).unwrap();
    assert_eq!(has_burst(&mut engine, &mut rig), None);
    let of_primary = ["OK -> WATCH", "WATCH -> AT_RISK", "AT_RISK -> WATCH"].map(|change| (Some(PRIMARY), change));
    assert_eq!(changes(&engine), of_primary);
}

/// Neither a slot that is read only after retries, nor a block that leaves one.
#[test]
fn what_the_spare_does_is_not_put_down_to_the_primary() {
    let mut rig = begun(SMALL);
    let mut engine = rig.open().unwrap();
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_A)), Ok(Status::Ok));
    let of_primary = vec![("remapped-recently", 1)];
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, of_primary.clone()));
    let slot = rig.shape.layout().slots_start + u64::from(engine.map()[0].1) * 4096;
    rig.bad.push(unreadable(SPARE, slot, 4096, Reads::Times(1)));
    assert!(engine.read(&mut rig, BLOCK_A * BLOCK, BLOCK).is_some());
    let with_spare = [&of_primary[..], &[("recovered-reads", 1)]].concat();
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, with_spare));
    rig.bad.push(Bad { device: SPARE, from: slot, to: slot + 4096, reads: Reads::Good, writes: true });
    assert_eq!(engine.write(&mut rig, BLOCK_A * BLOCK, &new(BLOCK_B)), Ok(Status::Ok));
    let with_spare = [&of_primary[..], &[("slots-retired", 1), ("recovered-reads", 1)]].concat();
    assert_eq!(judged(&mut engine, &mut rig), (HealthState::AtRisk, with_spare));
    let expected = [(Some(PRIMARY), "OK -> AT_RISK"), (Some(SPARE), "OK -> WATCH"), (Some(SPARE), "WATCH -> AT_RISK")];
    assert_eq!(changes(&engine), expected);
}
