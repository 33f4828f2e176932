//! Each scenario of the predecessor's operators' list has a test whose comment names its number.

use std::collections::BTreeSet;

use crate::sources;

/// The list has so many.
const SCENARIOS: u32 = 33;
/// Of a part that is not made yet: discovery.
const SCENARIOS_LATER: [u32; 1] = [20];

/// Numbers after the word, as in `Scenario 2, with…` or `Scenarios 6 and 7.`
fn scenarios(doc: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for (at, _) in doc.match_indices("Scenario") {
        let mut rest = doc[at..].trim_start_matches("Scenario").trim_start_matches('s').trim_start();
        while let Some(len) = rest.find(|c: char| !c.is_ascii_digit()).or(Some(rest.len())).filter(|len| *len > 0) {
            found.push(rest[..len].parse().expect("a small number"));
            rest = &rest[len..];
            match rest.strip_prefix(", ").or_else(|| rest.strip_prefix(" and ")) {
                Some(more) => rest = more,
                None => break,
            }
        }
    }
    found
}

#[test]
fn each_scenario_has_a_test_that_says_so() {
    let mut found = BTreeSet::new();
    for source in sources() {
        let mut doc = String::new();
        for line in source.text.lines().map(str::trim) {
            if let Some(text) = line.strip_prefix("///") {
                doc.push_str(text);
            } else {
                if line == "#[test]" {
                    found.extend(scenarios(&doc));
                }
                doc.clear();
            }
        }
    }
    let expected = (1..=SCENARIOS).filter(|number| !SCENARIOS_LATER.contains(number));
    let missing: Vec<u32> = expected.filter(|number| !found.contains(number)).collect();
    assert_eq!(missing, [] as [u32; 0], "scenarios of the predecessor's list that no test's comment names");
    assert!(SCENARIOS_LATER.iter().all(|number| !found.contains(number)), "take them off SCENARIOS_LATER");
}

#[test]
fn numbers_of_scenarios_are_read_from_comments() {
    assert_eq!(scenarios(" Scenario 22, E3: a slot"), [22]);
    assert_eq!(scenarios(" Scenarios 6 and 7. Scenarios 1, 2 and 33"), [6, 7, 1, 2, 33]);
    assert_eq!(scenarios(" Scenario 9: 64 blocks"), [9]);
}
