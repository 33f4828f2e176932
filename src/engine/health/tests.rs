//! Each rule at its limit and below, and what the score is made of.

use super::*;

const TODAY: u64 = 20_787;

fn healthy(days: &[Day]) -> Inputs<'_> {
    Inputs {
        today: TODAY,
        days,
        devices: [DeviceInputs::default(); 2],
        remapped: 0,
        lost_sectors: 0,
        slots: 16_384,
        slots_used: 0,
        slots_retired: 0,
        places_retired: 0,
        requests: 1_000_000,
        requests_in_error: 0,
    }
}

fn day(back: u64) -> Day {
    Day { day: TODAY - back, ..Day::default() }
}

/// The one rule that holds, and what it says of volume, primary and spare.
#[track_caller]
fn only(inputs: &Inputs<'_>) -> (&'static str, u64, HealthState, [HealthState; 2]) {
    let found = assess(inputs);
    let [finding] = &*found.findings else { panic!("{:?}", found.findings) };
    assert_eq!(found.state, finding.state);
    (finding.rule, finding.value, found.state, found.devices)
}

fn check_rule(rule: &str, state: HealthState, part: Part, below: &Inputs<'_>, at: &Inputs<'_>) {
    assert!(assess(below).findings.iter().all(|finding| finding.rule != rule), "{rule} holds too early");
    let found = assess(at);
    let finding = found.findings.iter().find(|finding| finding.rule == rule && finding.part == part);
    let finding = finding.unwrap_or_else(|| panic!("{rule} does not hold: {:?}", found.findings));
    assert_eq!((finding.state, finding.value >= finding.limit), (state, true), "{rule}");
    assert!(found.state >= state && found.devices[part.index()] >= state, "{rule}");
}

#[test]
fn nothing_is_wrong_with_a_fresh_volume() {
    let found = assess(&healthy(&[]));
    assert_eq!((found.state, found.devices, found.score), (HealthState::Ok, [HealthState::Ok; 2], 100));
    assert!(found.findings.is_empty() && found.deductions.is_empty());
}

#[test]
fn each_rule_holds_from_its_limit_on() {
    use HealthState::{AtRisk, Replace, Watch};
    let base = healthy(&[]);
    check_rule("lost", Watch, Part::Primary, &base, &Inputs { lost_sectors: 1, ..base });
    let used = |percent: u64| Inputs { slots: 100, slots_used: percent, ..base };
    check_rule("spare-filling", Watch, Part::Primary, &used(79), &used(80));
    check_rule("spare-used", Replace, Part::Primary, &used(89), &used(90));
    let moved = |back| [Day { remaps: 1, ..day(back) }];
    check_rule("remapped-recently", AtRisk, Part::Primary, &healthy(&moved(70)), &healthy(&moved(69)));
    let lost = |back| [Day { lost: 1, ..day(back) }];
    check_rule("lost-recently", AtRisk, Part::Primary, &healthy(&lost(70)), &healthy(&lost(69)));
    for part in Part::ALL {
        let with = |change: fn(&mut DeviceInputs)| {
            let mut inputs = base;
            change(&mut inputs.devices[part.index()]);
            inputs
        };
        let burst = (with(|device| device.burst = 9), with(|device| device.burst = 10));
        check_rule("error-burst", AtRisk, part, &burst.0, &burst.1);
        check_rule("pending", Watch, part, &base, &with(|device| device.pending = 1));
        check_rule("recovered-reads", Watch, part, &base, &with(|device| device.recovered_reads = 1));
        check_rule("not-answering", AtRisk, part, &base, &with(|device| device.gone = true));
        check_rule("flush-failed", Replace, part, &base, &with(|device| device.poisoned = true));
        let failed = |back| {
            let mut flush_failed = [false; 2];
            flush_failed[part.index()] = true;
            [Day { flush_failed, ..day(back) }]
        };
        check_rule("flush-failed", Replace, part, &healthy(&failed(70)), &healthy(&failed(69)));
    }
    check_rule("slots-retired", AtRisk, Part::Spare, &base, &Inputs { slots_retired: 1, ..base });
    check_rule("place-retired", Replace, Part::Spare, &base, &Inputs { places_retired: 1, ..base });
    let remapped = |remapped| Inputs { remapped, ..base };
    check_rule("many-remaps", Replace, Part::Primary, &remapped(1000), &remapped(1001));
    let weeks = |backs: [u64; 3]| backs.map(|back| Day { remaps: 1, ..day(back) });
    let (gap, growing) = (weeks([13, 6, 0]), weeks([20, 13, 0]));
    check_rule("growing", Replace, Part::Primary, &healthy(&gap), &healthy(&growing));
}

/// The table in the documentation is the one that is used.
#[test]
fn the_documented_rules_are_those_there_are() {
    let documented: Vec<(String, String)> = include_str!("mod.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//! | `"))
        .map(|row| {
            let mut cells = row.split(" | ");
            (cells.next().unwrap().trim_end_matches('`').to_owned(), cells.next().unwrap().to_owned())
        })
        .collect();
    let used: Vec<_> = RULES.iter().map(|rule| (rule.name.to_owned(), rule.state.name().to_owned())).collect();
    assert_eq!(documented, used);
    assert!(RULES.is_sorted_by_key(|rule| rule.state));
}

#[test]
fn one_device_that_fails_says_nothing_of_the_other() {
    let mut inputs = healthy(&[]);
    inputs.slots_retired = 2;
    let expected = [HealthState::Ok, HealthState::AtRisk];
    assert_eq!(only(&inputs), ("slots-retired", 2, HealthState::AtRisk, expected));
}

#[test]
fn findings_come_worst_first_with_their_numbers() {
    let days = [Day { remaps: 4, lost: 2, ..day(3) }];
    let mut inputs = Inputs { remapped: 2000, slots_used: 2000, ..healthy(&days) };
    inputs.devices[0].pending = 7;
    let found = assess(&inputs);
    let rows: Vec<_> = found.findings.iter().map(|finding| (finding.rule, finding.value)).collect();
    assert_eq!(rows, [("many-remaps", 2000), ("remapped-recently", 4), ("lost-recently", 2), ("pending", 7)]);
}

#[test]
fn the_score_is_what_the_deductions_leave_and_never_better_than_the_state() {
    let base = healthy(&[]);
    let score = |inputs: Inputs<'_>| assess(&inputs).score;
    // Too few for a rule.
    assert_eq!(score(Inputs { slots: 100, slots_used: 21, ..base }), 90);
    assert_eq!(score(Inputs { requests_in_error: 200, ..base }), 95);
    assert_eq!(score(Inputs { requests_in_error: 100, ..base }), 100);
    // Errors at the start are not put down to every request.
    assert_eq!(score(Inputs { requests_in_error: 1, requests: 1, ..base }), 100);
    let recovered = DeviceInputs { recovered_reads: 1, ..DeviceInputs::default() };
    assert_eq!(score(Inputs { devices: [recovered, DeviceInputs::default()], ..base }), 94);
    assert_eq!(score(Inputs { slots_retired: 1, ..base }), 79);
    assert_eq!(score(Inputs { remapped: 1001, ..base }), 39);
    // Everything at once.
    let worst = Inputs {
        lost_sectors: 9,
        slots_used: 16_384,
        requests_in_error: u64::MAX,
        devices: [DeviceInputs { burst: 10, pending: 50, recovered_reads: 1, gone: true, poisoned: true }; 2],
        ..base
    };
    assert_eq!(score(worst), 0);
    let sum = |inputs: &Inputs<'_>| assess(inputs).deductions.iter().map(|deduction| deduction.points).sum::<u64>();
    assert_eq!(sum(&worst), 50 + 30 + 25 + 50 + 20);
}

#[test]
fn scores_have_the_predecessors_words() {
    let words = [(100, "EXCELLENT"), (94, "GOOD"), (79, "FAIR"), (59, "POOR"), (39, "CRITICAL"), (0, "CRITICAL")];
    assert_eq!(words.map(|(score, _)| (score, score_word(score))), words);
}

#[test]
fn a_burst_is_over_when_its_time_is() {
    let second = |n: u64| Time(n * 1_000_000_000);
    let mut burst = Burst::default();
    (0..30).for_each(|n| burst.note(second(n)));
    assert_eq!(burst.count(second(30)), 10);
    assert_eq!(burst.count(second(620)), 10);
    assert_eq!(burst.count(second(625)), 5);
    assert_eq!(burst.count(second(630)), 0);
}
