//! Rules of this tree that no compiler knows: layers, words, `unsafe`, sizes, and that the documentation
//! names tests that exist. Two tables are read from the documentation itself (`src/lib.rs`), so that it
//! cannot say one thing while the code does another.

#[path = "tidy/mutants.rs"]
mod mutants;
#[path = "tidy/scenarios.rs"]
mod scenarios;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Files with `unsafe` in their code, and why they need it. Tests make the same promises as the code they test.
const UNSAFE: [(&str, &str); 34] = [
    ("src/device/buffer.rs", "aligned allocations, and copies out of and into memory that others change"),
    ("src/device/buffer/tests.rs", "does with buffers what devices do"),
    ("src/device/fault.rs", "passes on the promise of `Device::submit`, and writes around bad sectors"),
    ("src/device/fault/tests.rs", "submits operations"),
    ("src/device/memory.rs", "copies between the disks and the submitter's memory"),
    ("src/device/memory/tests.rs", "submits operations"),
    ("src/device/mod.rs", "declares `Device::submit`, the one promise about memory"),
    ("src/device/operation.rs", "resolves what is left of an operation to addresses"),
    ("src/device/operation/tests.rs", "submits operations"),
    ("src/device/sys.rs", "system calls"),
    ("src/device/threads.rs", "hands operations to threads"),
    ("src/device/uring.rs", "hands operations to the kernel"),
    ("src/device/watch.rs", "watches file descriptors that others own"),
    ("src/runtime/healer.rs", "submits what the healer emits"),
    ("src/runtime/signals.rs", "system calls"),
    ("src/serve.rs", "takes over an inherited file descriptor"),
    ("src/vhost/chain.rs", "copies out of and into guest memory, once"),
    ("src/vhost/dirty.rs", "sets bits in the dirty log, which the front-end reads and clears"),
    ("src/vhost/drive.rs", "submits what the shard emits"),
    ("src/vhost/inflight.rs", "maps the region of requests in flight, which the front-end can see"),
    ("src/vhost/interleavings/volume.rs", "submits operations"),
    ("src/vhost/memory.rs", "maps guest memory"),
    ("src/vhost/ring.rs", "atomic accesses to rings in guest memory"),
    ("tests/bench/machine.rs", "asks for the processor time of another process"),
    ("tests/conformance.rs", "submits operations"),
    ("tests/fuzz/harness/volume.rs", "submits operations"),
    ("tests/instructions.rs", "is a device"),
    ("tests/metadata/rig.rs", "submits operations"),
    ("tests/process/guest.rs", "hands guest memory to the driver"),
    ("tests/process/notify.rs", "makes a thread of the server stand still"),
    ("tests/process/seccomp.rs", "lets the kernel refuse a system call"),
    ("tests/sim/disk/memory.rs", "copies between the disks and the submitter's memory"),
    ("tests/sim/guest.rs", "hands guest memory to the engine"),
    ("tests/sim/memory.rs", "gives out memory"),
];

/// Lines of a file, at most.
const LINES_MAX: usize = 500;
/// Files that may have more, how many, and why.
const LONG_FILES: [(&str, usize, &str); 10] = [
    ("src/device/memory.rs", 800, "a crash model is read in one go"),
    ("src/device/open.rs", 800, "everything that refuses a device"),
    ("src/engine/healer/mod.rs", 800, "the healer's state and its way through a request"),
    ("src/engine/healer/write.rs", 800, "one ladder"),
    ("src/engine/shard.rs", 800, "one state machine"),
    ("src/runtime/volume.rs", 800, "making, opening and closing, the same steps in three orders"),
    ("src/vhost/worker.rs", 800, "one event loop"),
    ("tests/conformance.rs", 800, "one suite"),
    ("tests/sim/every_io/scenario.rs", 800, "one table"),
    ("tests/sim/world.rs", 800, "one world"),
];

const COLUMNS_MAX: usize = 120;

/// Layers below `vhost`.
const BELOW_VHOST: [&str; 6] = ["units", "sync", "device", "volume", "engine", "runtime"];

/// What the guest's side calls things, which has no meaning below it.
const WORDS_OF_VHOST: [&str; 4] = ["virtio", "vring", "virtqueue", "descriptor"];

/// In `vhost`: not a place on the spare but a region of guest memory, in the protocol's words.
const MEMORY_SLOTS: [&str; 2] = ["CONFIGURE_MEM_SLOTS", "get_max_mem_slots"];

/// What the pure layers must not touch: clocks, threads, randomness, files, and orders that differ
/// between runs.
const IMPURE: [&str; 10] = [
    "Instant",
    "SystemTime",
    "thread",
    "HashMap",
    "HashSet",
    "File",
    "OpenOptions",
    "TcpStream",
    "UnixStream",
    "random",
];

/// The promises of the contract, each of which has a row in the table of `src/lib.rs`.
const PROMISES: [&str; 27] = [
    "R1", "R2", "R3", "R4", "W1", "W2", "W3", "W4", "W5", "W6", "W7", "W8", "F1", "F2", "F3", "O1", "O2", "O3", "O4",
    "O5", "E1", "E2", "E3", "E4", "E5", "P1", "P2",
];

struct Source {
    /// From the root of the tree, with `/`.
    path: String,
    text: String,
    /// The text with spaces in place of comments and the insides of strings.
    code: String,
}

impl Source {
    /// `src/vhost/ring.rs`: `["vhost", "ring"]`; `src/lib.rs`: nothing.
    fn modules(&self) -> Vec<&str> {
        let inside = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        let mut modules: Vec<&str> = inside.split('/').filter(|name| !["mod", "lib"].contains(name)).collect();
        modules.retain(|name| !name.is_empty());
        modules
    }

    /// The layer of a file under `src`.
    fn layer(&self) -> Option<&str> {
        if self.path.starts_with("src/") { self.modules().first().copied() } else { None }
    }

    fn is_test(&self) -> bool {
        !self.path.starts_with("src/")
            || ["/tests.rs", "/testing.rs"].iter().any(|name| self.path.ends_with(name))
            || self.path.contains("/interleavings/")
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files_under(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() {
            // Of nested packages, like the fuzz targets, only their own sources are ours.
            if name != "target" && name != ".git" {
                files_under(&path, found);
            }
        } else {
            found.push(path);
        }
    }
}

fn read(folders: &[&str], wanted: impl Fn(&Path) -> bool) -> Vec<Source> {
    let mut paths = Vec::new();
    folders.iter().for_each(|folder| files_under(&root().join(folder), &mut paths));
    paths.sort();
    let sources = paths.into_iter().filter(|path| wanted(path)).filter_map(|path| {
        let text = fs::read_to_string(&path).ok()?;
        let path = path.strip_prefix(root()).expect("found there").to_string_lossy().replace('\\', "/");
        Some(Source { code: code_of(&text), path, text })
    });
    sources.collect()
}

fn sources() -> Vec<Source> {
    read(&["src", "tests"], |path| path.extension().is_some_and(|extension| extension == "rs"))
}

/// Blank out comments and the insides of strings, keeping lines and columns.
fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut code = chars.clone();
    let mut at = 0;
    while at < chars.len() {
        let end = match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => position(&chars, at, |rest| rest[0] == '\n'),
            '/' if chars.get(at + 1) == Some(&'*') => position(&chars, at, |rest| rest.starts_with(&['*', '/'])) + 2,
            '"' => string_end(&chars, at),
            'r' if !follows_name(&chars, at) || (at > 0 && chars[at - 1] == 'b') => raw_string_end(&chars, at),
            '\'' if chars.get(at + 1) == Some(&'\\') => position(&chars, at + 3, |rest| rest[0] == '\'') + 1,
            '\'' if chars.get(at + 2) == Some(&'\'') => at + 3,
            _ => at,
        };
        for blank in code.iter_mut().take(end.min(chars.len())).skip(at).filter(|c| !['\n', '"'].contains(c)) {
            *blank = ' ';
        }
        at = end.max(at + 1);
    }
    code.into_iter().collect()
}

fn position(chars: &[char], from: usize, is: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len()).find(|at| is(&chars[*at..])).unwrap_or(chars.len())
}

fn follows_name(chars: &[char], at: usize) -> bool {
    at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_')
}

fn string_end(chars: &[char], start: usize) -> usize {
    let mut at = start + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn raw_string_end(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|c| **c == '#').count();
    if chars.get(start + 1 + hashes) != Some(&'"') {
        return start;
    }
    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    position(chars, start + 2 + hashes, |rest| rest.starts_with(&close)) + close.len()
}

/// The names in a line of code.
fn names(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|name| !name.is_empty())
}

/// What a rule found, `file:line` first; printed together at the end.
#[derive(Default)]
struct Findings(String);

impl Findings {
    fn add(&mut self, path: &str, line: usize, what: impl std::fmt::Display) {
        writeln!(self.0, "{path}:{}: {what}", line + 1).expect("a string takes everything");
    }

    fn none(&self, rule: &str) {
        assert!(self.0.is_empty(), "{rule}:\n{}", self.0);
    }
}

/// Rows of the table in `src/lib.rs` whose header begins with `first`, cell by cell.
fn documented_table(first: &str) -> Vec<(usize, Vec<String>)> {
    let text = fs::read_to_string(root().join("src/lib.rs")).expect("src/lib.rs is there");
    let row = |line: &str| -> Option<Vec<String>> {
        let cells = line.strip_prefix("//! |")?.trim_end().strip_suffix('|')?;
        Some(cells.split('|').map(|cell| cell.trim().to_owned()).collect())
    };
    let lines: Vec<&str> = text.lines().collect();
    let is_header = |line: &&str| row(line).is_some_and(|cells| cells[0] == first);
    let header = lines.iter().position(is_header).unwrap_or_else(|| panic!("src/lib.rs has a table of {first}s"));
    let rows = lines.iter().enumerate().skip(header + 2).map_while(|(at, line)| Some((at, row(line)?)));
    rows.collect()
}

/// The words between backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Each layer with the layers it may use.
fn arrows() -> BTreeMap<String, BTreeSet<String>> {
    let own = |words: Vec<&str>| words.into_iter().map(str::to_owned).collect::<BTreeSet<String>>();
    let rows = documented_table("layer");
    rows.iter().map(|(_, cells)| (quoted(&cells[0])[0].to_owned(), own(quoted(&cells[1])))).collect()
}

/// The layers that a file names in its code, with the lines.
fn uses(source: &Source, layers: &BTreeMap<String, BTreeSet<String>>) -> Vec<(usize, String)> {
    let depth = source.modules().len();
    let mut found = Vec::new();
    for (at, _) in source.code.match_indices("::") {
        let before = &source.code[..at];
        let prefix = before.rsplit(|c: char| !c.is_alphanumeric() && !"_:".contains(c)).next().unwrap_or("");
        let supers = prefix.split("::").filter(|part| *part == "super").count();
        let at_root = prefix == "crate"
            || prefix == "vhost_remap"
            || (supers >= depth && supers > 0 && prefix.split("::").all(|part| ["self", "super"].contains(&part)));
        if !at_root {
            continue;
        }
        let line = before.matches('\n').count();
        let after = &source.code[at + 2..];
        let named: Vec<&str> = match after.strip_prefix('{') {
            Some(group) => top_level_names(group),
            None => names(after.lines().next().unwrap_or("")).take(1).collect(),
        };
        found.extend(named.into_iter().filter(|n| layers.contains_key(*n)).map(|name| (line, name.to_owned())));
    }
    found
}

/// First names of the parts of a `{…}` group, whose brace is already gone.
fn top_level_names(group: &str) -> Vec<&str> {
    let (mut depth, mut start, mut found) = (0, 0, Vec::new());
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                found.extend(names(&group[start..at]).take(1));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    found
}

#[test]
fn layers_use_only_what_lies_below_them() {
    let arrows = arrows();
    let mut findings = Findings::default();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let Some(layer) = source.layer() else { continue };
        let Some(allowed) = arrows.get(layer) else {
            findings.add(&source.path, 0, format!("`{layer}` is not in the table of layers"));
            continue;
        };
        for (line, used) in uses(source, &arrows) {
            if used != layer && !allowed.contains(&used) {
                findings.add(&source.path, line, format!("`{layer}` uses `{used}`"));
            }
        }
    }
    findings.none("a layer uses one that the table of layers in src/lib.rs does not give it");
}

#[test]
fn the_arrows_make_no_circle() {
    let mut arrows = arrows();
    while !arrows.is_empty() {
        let before = arrows.len();
        let done: Vec<String> =
            arrows.iter().filter(|(_, uses)| uses.is_empty()).map(|(name, _)| name.clone()).collect();
        arrows.retain(|name, _| !done.contains(name));
        arrows.values_mut().for_each(|uses| uses.retain(|name| !done.contains(name)));
        assert!(arrows.len() < before, "src/lib.rs: a circle among {:?}", arrows.keys());
    }
}

#[test]
fn words_stay_in_their_layers() {
    let mut findings = Findings::default();
    for source in sources() {
        let Some(layer) = source.layer() else { continue };
        for (at, (code, line)) in source.code.lines().zip(source.text.lines()).enumerate() {
            let words = names(code).map(|name| (name, name.to_lowercase()));
            if BELOW_VHOST.contains(&layer) {
                for (name, lower) in words {
                    if WORDS_OF_VHOST.iter().any(|word| lower.contains(word)) {
                        findings.add(&source.path, at, format!("`{name}` is a word of `vhost`"));
                    }
                }
                let cites = line.contains("virtio 1.") && line.contains('§');
                if line.to_lowercase().contains("virtio") && !cites {
                    findings.add(&source.path, at, "only a citation (virtio 1.3 §…) may speak of virtio here");
                }
            } else if layer == "vhost" && !source.is_test() {
                for (name, _) in words.filter(|(name, lower)| lower.contains("slot") && !MEMORY_SLOTS.contains(name)) {
                    findings.add(&source.path, at, format!("`{name}`: slots are places on the spare, unknown here"));
                }
            }
        }
    }
    findings.none("virtio's words stay in `vhost`, and slots below it");
}

#[test]
fn the_pure_layers_do_nothing_but_compute() {
    let mut findings = Findings::default();
    let pure = |source: &&Source| ["units", "volume", "engine"].contains(&source.layer().unwrap_or(""));
    for source in sources().iter().filter(pure) {
        for (at, line) in source.code.lines().enumerate() {
            for name in names(line).filter(|name| IMPURE.contains(name)) {
                findings.add(&source.path, at, format!("`{name}`"));
            }
        }
    }
    findings.none("units, volume and engine know no clock, thread, chance, file or random order");
}

#[test]
fn unsafe_code_is_where_it_is_expected_and_says_why() {
    let listed: BTreeMap<&str, &str> = UNSAFE.into_iter().collect();
    let mut findings = Findings::default();
    let mut seen = BTreeSet::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (at, line) in source.code.lines().enumerate().filter(|(_, line)| names(line).any(|name| name == "unsafe")) {
            seen.insert(source.path.clone());
            if !listed.contains_key(source.path.as_str()) {
                findings.add(&source.path, at, "not a file that may have `unsafe`: see UNSAFE in tests/tidy.rs");
            }
            let promises = line.contains("unsafe {") || line.contains("unsafe impl");
            if promises && !lines[at.saturating_sub(10)..at].iter().any(|above| above.contains("SAFETY:")) {
                findings.add(&source.path, at, "no SAFETY comment");
            }
        }
    }
    for (path, _) in UNSAFE.iter().filter(|(path, _)| !seen.contains(*path)) {
        findings.add(path, 0, "has no `unsafe` any more: take it off the list in tests/tidy.rs");
    }
    findings.none("`unsafe` in unexpected places, or without a reason");
}

#[test]
fn nothing_is_left_for_later() {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let exempting = [concat!("#[al", "low("), concat!("#![al", "low(")];
    let mut findings = Findings::default();
    let mut files = read(&["src", "tests", "ci", "vm-images"], |_| true);
    for name in ["Cargo.toml", "Makefile", "README.md"] {
        let text = fs::read_to_string(root().join(name)).unwrap_or_default();
        files.push(Source { path: name.into(), code: String::new(), text });
    }
    for source in &files {
        for (at, line) in source.text.lines().enumerate() {
            if let Some(mark) = names(line).find(|name| marks.contains(name)) {
                findings.add(&source.path, at, mark);
            }
            if let Some(attribute) = exempting.iter().find(|attribute| line.contains(*attribute)) {
                findings.add(&source.path, at, format!("{attribute}: use #[expect(…, reason = \"…\")]"));
            }
        }
    }
    findings.none("notes to oneself and lints switched off do not belong in the tree");
}

#[test]
fn lines_and_files_have_a_bounded_length() {
    let mut findings = Findings::default();
    for source in sources() {
        for (at, line) in source.text.lines().enumerate() {
            // Messages stay whole, so that they can be searched for; rows of tables cannot be broken.
            let whole = line.contains('"') || line.trim_start().starts_with("//! |");
            if line.chars().count() > COLUMNS_MAX && !whole {
                findings.add(&source.path, at, format!("{} columns of {COLUMNS_MAX}", line.chars().count()));
            }
        }
        let lines = source.text.lines().count();
        let exception = LONG_FILES.iter().find(|(path, ..)| *path == source.path);
        let max = exception.map_or(LINES_MAX, |(_, max, _)| *max);
        if lines > max {
            findings.add(&source.path, max, format!("{lines} lines of {max}: split it, or see LONG_FILES"));
        }
        if exception.is_some() && lines <= LINES_MAX * 9 / 10 {
            findings.add(&source.path, 0, format!("{lines} lines: take it off LONG_FILES in tests/tidy.rs"));
        }
    }
    findings.none("too long");
}

/// Names of all test functions: those with an attribute that ends in `test]` above them.
fn test_names() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for source in sources() {
        let mut is_test = false;
        for line in source.code.lines().map(str::trim) {
            if line.starts_with("#[test]") {
                is_test = true;
            } else if let (true, Some((_, rest))) = (is_test, line.split_once("fn ")) {
                found.extend(names(rest).take(1).map(str::to_owned));
                is_test = false;
            }
        }
    }
    found
}

#[test]
fn each_promise_names_tests_that_exist() {
    let tests = test_names();
    let mut findings = Findings::default();
    let rows = documented_table("promise");
    for (at, cells) in &rows {
        let named = quoted(&cells[2]);
        if named.is_empty() && cells[2] != "not yet" {
            findings.add("src/lib.rs", *at, format!("{}: name a test, or write `not yet`", cells[0]));
        }
        for name in named.into_iter().filter(|name| !tests.contains(*name)) {
            findings.add("src/lib.rs", *at, format!("{}: there is no test `{name}`", cells[0]));
        }
    }
    let documented: Vec<&str> = rows.iter().map(|(_, cells)| cells[0].as_str()).collect();
    assert_eq!(documented, PROMISES, "src/lib.rs: the table has each promise once, in order");
    findings.none("the table of promises in src/lib.rs names tests");
}

#[test]
fn comments_and_strings_are_not_code() {
    let code = code_of("a // crate::x\n\"crate::y \\\" z\" 'c' '\\'' 'a: r#\"in \" side\"# /* no */ b\n");
    assert_eq!(names(&code).collect::<Vec<_>>(), ["a", "a", "b"]);
    assert_eq!(code.lines().count(), 2);
}

#[test]
fn grouped_imports_are_seen() {
    assert_eq!(top_level_names("a::{b, c}, d, e::f};\nuse g"), ["a", "d", "e"]);
}
