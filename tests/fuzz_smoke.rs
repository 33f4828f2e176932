//! What the fuzz targets run, over every committed seed and some thousands of mutations of the seeds: so that a
//! compiler without libFuzzer sees too what it has found, and that a seed is no more than a file.
//!
//! The same inputs each time: how many there are is counted, and no clock ends the tests.

#[path = "fuzz/harness/mod.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Longest input that mutation makes.
const INPUT_MAX: usize = 2048;

/// One target at a time: they count the descriptors of the process, and set its log level.
static ALONE: Mutex<()> = Mutex::new(());

/// Where the target's folders and dictionary are.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = root().join("seeds").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut seeds: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
        })
        .collect();
    // Directories have no order.
    seeds.sort();
    assert!(!seeds.is_empty(), "{}: no seeds", folder.display());
    seeds
}

/// The words of a dictionary in libFuzzer's format: `name="word"`, with `\\`, `\"` and `\xHH` in the word.
fn words(target: &str) -> Vec<Vec<u8>> {
    let path = root().join("dictionaries").join(format!("{target}.dict"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|line| word(line).unwrap_or_else(|| panic!("{}: {line}", path.display()))).collect()
}

fn word(line: &str) -> Option<Vec<u8>> {
    let mut rest = line.split_once('"')?.1.strip_suffix('"')?;
    let mut word = Vec::new();
    while let Some(c) = rest.chars().next() {
        let (byte, len) = match (c, rest.get(1..2)) {
            ('\\', Some("x")) => (u8::from_str_radix(rest.get(2..4)?, 16).ok()?, 4),
            ('\\', Some("\\" | "\"")) => (rest.as_bytes()[1], 2),
            ('\\' | '"', _) => return None,
            _ => (u8::try_from(c).ok()?, 1),
        };
        word.push(byte);
        rest = rest.get(len..)?;
    }
    (!word.is_empty()).then_some(word)
}

/// Seeded chance: xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % end
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }
}

/// A mutation of one seed, or of two.
fn mutate(random: &mut Random, seeds: &[(String, Vec<u8>)], words: &[Vec<u8>]) -> Vec<u8> {
    let mut input = seeds[random.below(seeds.len())].1.clone();
    for _ in 0..=random.below(6) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 => input.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << random.below(8)),
            1 => input.get_mut(at).into_iter().for_each(|byte| *byte = random.byte()),
            2 => _ = input.splice(at..at, (0..=random.below(8)).map(|_| random.byte())),
            3 => _ = input.drain(at..(at + random.below(16)).min(input.len())),
            4 => {
                let word = &words[random.below(words.len())];
                let end = if random.below(2) == 0 { at } else { (at + word.len()).min(input.len()) };
                input.splice(at..end, word.iter().copied());
            }
            5 => {
                let other = &seeds[random.below(seeds.len())].1;
                let from = random.below(other.len() + 1);
                input.splice(at.., other[from..].iter().copied());
            }
            _ => {
                let piece = input[at..(at + random.below(32)).min(input.len())].to_vec();
                let to = random.below(input.len() + 1);
                input.splice(to..to, piece);
            }
        }
    }
    input.truncate(INPUT_MAX);
    input
}

/// Says what the input was when its run panics.
struct Shown<'a>(&'a str, &'a [u8]);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("{}: the input in hexadecimal: {hex}", self.0);
        }
    }
}

fn check(target: &str, mutations: u32, run: fn(&[u8])) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (seeds, words) = (seeds(target), words(target));
    for (name, seed) in &seeds {
        let _shown = Shown(name, seed);
        run(seed);
    }
    let mut random = Random(0x5eed_0000_0000_0001);
    for number in 0..mutations {
        let input = mutate(&mut random, &seeds, &words);
        let _shown = Shown(&format!("{target}, mutation {number}"), &input);
        run(&input);
    }
}

#[test]
fn no_chain_of_a_guest_panics_hangs_or_writes_where_it_may_not() {
    check("chains", 3000, harness::chains);
}

#[test]
fn damaged_metadata_is_refused_or_opened_in_the_same_way_again() {
    check("metadata", 2000, harness::metadata);
}

#[test]
fn a_front_end_that_talks_nonsense_leaves_the_server_as_it_was() {
    check("messages", 2000, harness::messages);
}

#[test]
fn every_request_to_the_control_socket_is_answered_in_http_and_changes_only_what_it_may() {
    check("control", 10_000, harness::control);
}
