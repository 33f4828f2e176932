//! Our transport and rust-vmm's, compared: the same seeded streams of requests get the same answers, byte for
//! byte, and leave the same data behind.
//!
//! Rings, chains, notifications and the protocol have nothing in common in the two. A stream has requests of all
//! kinds and shapes, wrong ones among them, over devices that fail by rule. It goes one request at a time, or one
//! at a time on each of two queues that use different parts of the disk.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_remap::runtime::report::{Counters, ListEntry};
use vhost_remap::volume::layout::Layout;

use crate::chains::{Chain, Chains};
use crate::frontend::{AREA, F_EVENT_IDX, F_INDIRECT, F_LOG_ALL, F_PACKED, FrontEnd, Ring, Setup};
use crate::model::{Model, Random, pattern};
use crate::server::{Server, TRANSPORTS, Volume, done, vhost_remap};

const MIB: u64 = 32;
const SECTORS: u64 = MIB * 2048;
const SLOTS: u32 = 96;
/// The part of the disk that sees most requests, so that they meet each other and the faults.
const HOT: (u64, u64) = (8192, 1536);
const LIMIT: Duration = Duration::from_secs(30);
/// What guest memory holds before a request.
const FILL: u8 = 0xee;

/// A volume that is the same each time, as far as a guest can see.
fn volume() -> Volume {
    let volume = Volume::absent();
    let (primary, size, slots) = (volume.primary.to_str().expect("UTF-8"), format!("{MIB}M"), SLOTS.to_string());
    let words = ["create", "--primary", primary, "--size", &size, "--max-remaps", &slots, "--serial", "transports"];
    done(&vhost_remap(&words));
    volume
}

/// What a stream does.
#[derive(Clone, Debug)]
enum Step {
    /// Offer a chain on a queue.
    Offer(usize, Chain),
    /// An order to the server.
    Order(Vec<String>),
    /// Write to the configuration; read all of it.
    Config(u32, Vec<u8>),
    /// Stop a queue and start it where it stopped.
    Restart(usize),
    /// Reset the device, and start with empty rings.
    Reset,
    /// Leave without a word and come back.
    Reconnect,
}

/// What a step came to.
#[derive(Clone, Debug, PartialEq)]
enum Outcome {
    Answer(Answer),
    Text(String),
    Config(bool, Vec<u8>),
    Base(u16),
    Nothing,
}

/// What came back of a chain.
#[derive(Clone, PartialEq)]
pub(crate) struct Answer {
    /// Head and length.
    pub(crate) used: (u32, u32),
    status: Option<u8>,
    /// All that the device may write, where the status is good; what it holds otherwise is nobody's business.
    data: Vec<u8>,
    /// A checksum of the rest of the ring's area, which must stay as it was.
    rest: u32,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (len, data) = (self.data.len(), crc32c::crc32c(&self.data));
        write!(f, "used {:?}, status {:?}, {len} bytes {data:08x}, rest {:08x}", self.used, self.status, self.rest)
    }
}

/// Offer a chain and wait for what comes of it.
pub(crate) fn offer(ring: &mut Ring, chain: &Chain) -> Answer {
    let area = ring.area();
    ring.write(area, &vec![FILL; usize::try_from(AREA).expect("small")]);
    for (at, bytes) in &chain.content {
        ring.write(*at, bytes);
    }
    if let Some((at, entries)) = &chain.table {
        ring.table(*at, entries);
    }
    for (index, descriptor) in &chain.descriptors {
        ring.descriptor(*index, *descriptor);
    }
    ring.offer(chain.head);
    let used = ring.take(LIMIT).unwrap_or_else(|| panic!("no answer within {LIMIT:?}: {chain:x?}"));
    let status = chain.status().map(|at| ring.read(at, 1)[0]);
    let mut rest = ring.read(area, usize::try_from(AREA).expect("small"));
    let mut data = Vec::new();
    for (at, len) in &chain.writable {
        // Of buffers beyond the area nothing is written.
        let Some(start) = at.checked_sub(area).filter(|start| start + u64::from(*len) <= AREA) else { continue };
        let start = usize::try_from(start).expect("small");
        let bytes = &mut rest[start..start + usize::try_from(*len).expect("small")];
        if status == Some(0) {
            data.extend_from_slice(bytes);
        }
        bytes.fill(0);
    }
    Answer { used, status, data, rest: crc32c::crc32c(&rest) }
}

/// A connection, and how to make it again.
struct Guest<'a> {
    server: &'a Server,
    front_end: Option<FrontEnd>,
    setup: Setup,
}

impl Guest<'_> {
    fn connect(server: &Server, setup: Setup) -> Guest<'_> {
        Guest { server, front_end: Some(FrontEnd::connect(&server.socket, setup)), setup }
    }

    fn front_end(&mut self) -> &mut FrontEnd {
        self.front_end.as_mut().expect("connected")
    }

    fn perform(&mut self, step: &Step) -> Outcome {
        match step {
            Step::Offer(queue, chain) => Outcome::Answer(offer(&mut self.front_end().rings[*queue], chain)),
            Step::Order(words) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let output = self.server.ask(&words);
                Outcome::Text(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
            }
            Step::Config(offset, bytes) => {
                let taken = self.front_end().set_config(*offset, bytes);
                Outcome::Config(taken, self.front_end().config(0, 96))
            }
            Step::Restart(queue) => {
                let base = self.front_end().stop(*queue);
                self.front_end().start(*queue, base);
                Outcome::Base(base)
            }
            Step::Reset => {
                self.front_end().reset();
                (0..self.setup.queues).for_each(|queue| self.front_end().start(queue, 0));
                Outcome::Nothing
            }
            Step::Reconnect => {
                self.front_end = None;
                self.front_end = Some(FrontEnd::connect(&self.server.socket, self.setup));
                Outcome::Nothing
            }
        }
    }
}

/// The queue's own chains; `part` of `parts` is its share of the disk.
fn chains(seed: u64, setup: Setup, queue: usize, parts: u64) -> Chains {
    // The same as the front-end's: each ring has an area of its own.
    let area = crate::frontend::area_of(queue);
    let (part, share) = (queue as u64 % parts, HOT.1 / parts);
    let sectors = (HOT.0 + part * share, share);
    let indirect = setup.without & F_INDIRECT == 0;
    Chains { random: Random(seed), area, size: setup.size, indirect, sectors, capacity: SECTORS }
}

fn words(text: &str) -> Step {
    Step::Order(text.split(' ').map(str::to_owned).collect())
}

/// Rules that a contract covers: bad media on the primary, slots that fail.
fn faults(random: &mut Random, sectors: (u64, u64), slots_too: bool) -> Vec<String> {
    let first = sectors.0 + random.below(sectors.1 - 16);
    let last = first + random.below(16);
    let (range, block) =
        (format!("--sectors {first}-{last}"), format!("--sectors {}-{}", first / 8 * 8, last / 8 * 8 + 7));
    let seed = random.next() % 1000;
    let rules = match random.below(if slots_too { 10 } else { 9 }) {
        0 => vec![format!("--ops write {range}")],
        1 => vec![format!("--ops write {range} --partial")],
        2 => vec![format!("--ops read {range}")],
        3 => vec![format!("--ops read {range} --until-rewritten")],
        4 => vec![format!("--ops read,write {range} --count 3")],
        5 => vec![format!("--ops read,write {range} --probability 0.5 --seed {seed}")],
        6 => vec![format!("--ops read,write {range} --errno ENODATA --count 1")],
        // A block that takes no write and gives only a part of its content: the rest is lost.
        7 | 8 => vec![format!("--ops write {block}"), format!("--ops read {range}")],
        _ => {
            // The place at the head of this spare is 1 MiB.
            let slot = 2048 + random.below(u64::from(SLOTS)) * 8;
            vec![format!("--device spare --ops read,write --sectors {slot}-{}", slot + random.below(8))]
        }
    };
    rules.into_iter().map(|rule| format!("fault add {rule}")).collect()
}

/// One request after the other, with faults and everything else between them.
fn stream(seed: u64, setup: Setup, len: usize) -> Vec<Step> {
    let mut random = Random(seed ^ 0x5eed);
    let mut chains: Vec<Chains> = (0..setup.queues).map(|queue| chains(seed + queue as u64, setup, queue, 1)).collect();
    let (mut steps, mut poisoned) = (Vec::new(), false);
    while steps.len() < len {
        let queue = usize::try_from(random.below(setup.queues as u64)).expect("small");
        let step = match random.below(50) {
            0..3 => {
                steps.extend(faults(&mut random, HOT, true).iter().map(|rule| words(rule)));
                continue;
            }
            3 => words("fault clear"),
            4 => Step::Config(32, vec![u8::try_from(random.below(2)).expect("a bit")]),
            5 => Step::Restart(queue),
            6 if random.below(2) == 0 => Step::Reset,
            6 => Step::Reconnect,
            _ => Step::Offer(queue, chains[queue].next()),
        };
        steps.push(step);
        if !poisoned && steps.len() > len / 2 {
            poisoned = true;
            // A flush that fails poisons the volume; what comes until the operator has looked is refused.
            steps.extend([words("fault add --ops flush --count 1"), Step::Offer(queue, chains[queue].flush())]);
            steps.extend((0..20).map(|_| Step::Offer(queue, chains[queue].next())));
            steps.extend([words("fault clear"), words("clear")]);
        }
    }
    steps
}

/// What is left of a stream.
#[derive(Debug, PartialEq)]
struct Remains {
    features: u64,
    protocol_features: u64,
    outcomes: Vec<Outcome>,
    list: Vec<ListEntry>,
    counters: Counters,
    /// Kind, device, sectors, cause and action of each.
    events: Vec<String>,
}

/// A server's own view at the end of a stream, and that of the guest.
fn remains(server: &Server, guest: &mut Guest<'_>, outcomes: Vec<Outcome>) -> Remains {
    let of_event = |mut event: vhost_remap::runtime::report::EventRecord| {
        if event.kind == "malformed" {
            // virtio-queue ends such a chain early and does not say why.
            event.cause.truncate(event.cause.find(": ").expect("queue and descriptor come first"));
        }
        format!(
            "{} {} {:?} {} {}: {}",
            event.kind, event.device, event.sector, event.sectors, event.cause, event.action
        )
    };
    // The framework tracks no requests, logs no writes, carries no state, and says nothing unasked.
    let features = guest.front_end().features & !F_LOG_ALL & !F_PACKED;
    let own = VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::DEVICE_STATE
        | VhostUserProtocolFeatures::BACKEND_REQ;
    let protocol_features = (guest.front_end().protocol_features - own).bits();
    let (list, counters) = (server.list(), server.status().counters);
    // Workers and healer report beside each other.
    let mut events: Vec<String> = server.events().into_iter().map(of_event).collect();
    events.sort();
    Remains { features, protocol_features, outcomes, list, counters, events }
}

#[track_caller]
fn assert_same(what: &str, steps: &[Step], own: &Remains, framework: &Remains) {
    for (at, (own, framework)) in own.outcomes.iter().zip(&framework.outcomes).enumerate() {
        assert!(own == framework, "{what}: step {at}: own {own:?}, framework {framework:?}: {:x?}", steps[at]);
    }
    assert_eq!(own.list, framework.list, "{what}");
    assert_eq!(own.counters, framework.counters, "{what}");
    for (own, framework) in own.events.iter().zip(&framework.events) {
        assert_eq!(own, framework, "{what}");
    }
    assert_eq!(own.events.len(), framework.events.len(), "{what}");
    assert!(own.features == framework.features && own.protocol_features == framework.protocol_features, "{what}");
}

/// The first bytes of a file that differ, if any do.
#[track_caller]
fn assert_same_bytes(what: &str, paths: [&Path; 2], start: u64, len: u64) {
    let read = |path: &Path| {
        let mut bytes = vec![0; usize::try_from(len).expect("small")];
        fs::File::open(path).unwrap().read_exact_at(&mut bytes, start).unwrap();
        bytes
    };
    let [own, framework] = paths.map(read);
    if let Some(at) = own.iter().zip(&framework).position(|(own, framework)| own != framework) {
        panic!("{what}: differs at byte {} of {}", start + at as u64, paths[0].display());
    }
}

/// Play one stream through both, on volumes that `make` makes; what came of it through ours.
fn compare(seed: u64, setup: Setup, options: &[&str], make: impl Fn() -> Rc<Volume>) -> Remains {
    let what = format!("seed {seed}, {setup:x?}, {options:?}");
    println!("{what}");
    let steps = stream(seed, setup, 300);
    let play = |transport: &&str| {
        let volume = make();
        let server = volume.serve(&[&["--transport", *transport], options].concat());
        assert_eq!(server.status().transport, *transport);
        let mut guest = Guest::connect(&server, setup);
        let outcomes = steps.iter().map(|step| guest.perform(step)).collect();
        let remains = remains(&server, &mut guest, outcomes);
        drop(guest);
        server.stop();
        (volume, remains)
    };
    let [(own_volume, own), (framework_volume, framework)] = TRANSPORTS.each_ref().map(play);
    assert_same(&what, &steps, &own, &framework);
    let primaries = [own_volume.primary.as_path(), framework_volume.primary.as_path()];
    assert_same_bytes(&what, primaries, 0, SECTORS * 512);
    let spares = [own_volume.spare.as_path(), framework_volume.spare.as_path()];
    assert_same_bytes(&what, spares, slots_start(&own_volume), u64::from(SLOTS) * 4096);
    own
}

fn slots_start(volume: &Volume) -> u64 {
    Layout::new(fs::metadata(&volume.spare).unwrap().len(), SLOTS).unwrap().slots_start
}

/// Streams that meet no trouble prove nothing.
fn assert_eventful(all: &[Remains]) {
    let total = |of: fn(&Counters) -> u64| all.iter().map(|remains| of(&remains.counters)).sum::<u64>();
    for (what, count) in [
        ("remaps", total(|c| c.remaps)),
        ("rewritten", total(|c| c.rewritten)),
        ("lost", total(|c| c.lost)),
        ("guest errors", total(|c| c.guest_errors)),
        ("discards", total(|c| c.discards)),
    ] {
        assert!(count > 0, "no {what}");
    }
    let answers = all.iter().flat_map(|remains| &remains.outcomes).filter_map(|outcome| match outcome {
        Outcome::Answer(answer) => Some((answer.status, answer.used.1.min(2))),
        _ => None,
    });
    let seen: std::collections::BTreeSet<_> = answers.collect();
    let expected = [(Some(0), 1), (Some(0), 2), (Some(1), 1), (Some(2), 1), (Some(FILL), 0), (None, 0)];
    assert!(expected.iter().all(|answer| seen.contains(answer)), "{seen:?}");
}

#[test]
fn both_transports_answer_every_request_alike() {
    let setup = |number: u64| Setup {
        queues: 1 + usize::try_from(number % 2).expect("a bit"),
        size: [256, 16, 64, 8][usize::try_from(number % 4).expect("small")],
        without: if number & 2 == 0 { 0 } else { F_EVENT_IDX } | if number & 4 == 0 { 0 } else { F_INDIRECT },
    };
    let options: [&[&str]; 3] = [&[], &["--io-engine", "threads"], &["--workers", "1"]];
    let compare = |seed: u64| {
        compare(seed, setup(seed), options[usize::try_from(seed % 3).expect("small")], || Rc::new(volume()))
    };
    let all: Vec<Remains> = match std::env::var("SEED") {
        Ok(seed) => vec![compare(seed.parse().expect("SEED is a number"))],
        Err(_) => (0..8).map(compare).collect(),
    };
    if all.len() > 1 {
        assert_eventful(&all);
    }
}

#[test]
fn both_transports_serve_a_read_only_disk_alike() {
    let volume = Rc::new(volume());
    let setup = Setup { queues: 2, size: 128, without: 0 };
    let server = volume.serve(&[]);
    let mut guest = server.guest(1);
    Model::written(&mut guest, HOT.0, HOT.1, 1);
    // Blocks that move, one of them with a lost sector.
    server.fault(&["--ops", "write", "--sectors", "8200-8263", "--sectors", "9000"]);
    server.fault(&["--ops", "read", "--sectors", "9003"]);
    for (sector, count) in [(8196, 70), (9000, 2)] {
        guest.write(sector, pattern(sector, count, 2)).unwrap();
    }
    assert_eq!((server.blocks("remapped").len(), server.status().blocks.lost_sectors), (9, 1));
    drop(guest);
    server.stop();
    let content = || (fs::read(&volume.primary).unwrap(), fs::read(&volume.spare).unwrap());
    let before = content();
    for seed in 100..102 {
        let remains = compare(seed, setup, &["--read-only"], || volume.clone());
        assert!(remains.counters.reads > 0 && remains.counters.writes == 0, "{:?}", remains.counters);
    }
    assert!(content() == before, "something was written");
}

/// What a stream of its own on each of two queues, both at once, comes to.
struct AtOnce {
    volume: Volume,
    answers: Vec<Vec<Answer>>,
    /// What is special, and what the slots of remapped blocks hold; not which slots they are.
    blocks: Vec<(ListEntry, Vec<u8>)>,
}

fn play_at_once(transport: &str, seed: u64, setup: Setup) -> AtOnce {
    let volume = volume();
    let server = volume.serve(&["--transport", transport]);
    let mut random = Random(seed);
    let mut front_end = FrontEnd::connect(&server.socket, setup);
    let mut chains = [0, 1].map(|queue| chains(seed + queue, setup, usize::try_from(queue).expect("small"), 2));
    for queue in &chains {
        // Slots are given out in the order of the failures, which is any here: none of them fails.
        for rule in std::iter::repeat_with(|| faults(&mut random, queue.sectors, false)).take(8).flatten() {
            server.order(&rule.split(' ').collect::<Vec<_>>());
        }
    }
    let play = |(ring, chains): (&mut Ring, &mut Chains)| (0..150).map(|_| offer(ring, &chains.next())).collect();
    let answers = std::thread::scope(|scope| {
        let queues = front_end.rings.iter_mut().zip(&mut chains);
        let threads: Vec<_> = queues.map(|queue| scope.spawn(move || play(queue))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let list = server.list();
    drop(front_end);
    server.stop();
    let spare = fs::File::open(&volume.spare).unwrap();
    let content = |mut entry: ListEntry| {
        let mut bytes = vec![0; 4096];
        if let Some(slot) = entry.slot.take() {
            spare.read_exact_at(&mut bytes, slots_start(&volume) + u64::from(slot) * 4096).unwrap();
        }
        (entry, bytes)
    };
    let blocks = list.into_iter().map(content).collect();
    AtOnce { volume, answers, blocks }
}

#[test]
fn both_transports_answer_two_queues_at_once_alike() {
    for (seed, without) in [(200, 0), (300, F_EVENT_IDX)] {
        println!("seed {seed}");
        let setup = Setup { queues: 2, size: 32, without };
        let [own, framework] = TRANSPORTS.map(|transport| play_at_once(transport, seed, setup));
        for (at, (own, framework)) in own.answers.concat().iter().zip(framework.answers.concat()).enumerate() {
            assert!(*own == framework, "request {at}: own {own:?}, framework {framework:?}");
        }
        let primaries = [own.volume.primary.as_path(), framework.volume.primary.as_path()];
        assert_same_bytes("two queues", primaries, 0, SECTORS * 512);
        assert!(own.blocks.iter().any(|(entry, _)| entry.state.contains(&"remapped".into())), "nothing was remapped");
        assert!(own.blocks == framework.blocks, "remapped blocks differ");
    }
}
