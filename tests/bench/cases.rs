//! What is measured.

use serde::Serialize;

use crate::load::{Area, Load, Pattern};
use crate::stage::{Medium, Peer, REMAPS, WHOLE};

/// What goes on beside a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Beside {
    Nothing,
    /// Somebody asks for the status ten times a second.
    Status,
    /// The healer moves blocks to the spare and back, one after the other.
    Healer,
    /// Passes of the scanner, one after the other, as they go by default.
    Scan,
}

/// One of those that are measured in turn.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Contender {
    pub(crate) name: &'static str,
    pub(crate) peer: Peer,
    pub(crate) area: Area,
    pub(crate) beside: Beside,
}

/// A load, and those that are measured with it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) medium: Medium,
    pub(crate) load: Load,
    pub(crate) contenders: Vec<Contender>,
}

pub(crate) const OURS: &str = "vhost-remap";
pub(crate) const POLLING: &str = "vhost-remap, polling";
pub(crate) const QSD: &str = "qemu-storage-daemon io_uring";
pub(crate) const FIO: &str = "raw fio io_uring";
pub(crate) const PASSTHROUGH: &str = "--passthrough";
pub(crate) const EMPTY: &str = "empty map";
pub(crate) const NONE_HIT: &str = "16,384 remaps, none hit";
pub(crate) const BETWEEN: &str = "16,384 remaps between, none hit";
pub(crate) const HIT: &str = "16,384 remaps, each request hits one";
pub(crate) const NOT_REMAPPED: &str = "the same data not remapped";
pub(crate) const NO_PASS: &str = "no pass under way";
pub(crate) const PASS: &str = "a pass under way";
pub(crate) const UNDISTURBED: &str = "undisturbed";
pub(crate) const STATUS_ASKED: &str = "status asked 10 times a second";
const QSD_THREADS: &str = "qemu-storage-daemon threads";

const fn contender(name: &'static str, peer: Peer) -> Contender {
    Contender { name, peer, area: WHOLE, beside: Beside::Nothing }
}

const ALL: [Contender; 4] = [
    contender(OURS, Peer::Empty),
    contender(QSD, Peer::QsdUring),
    contender(QSD_THREADS, Peer::QsdThreads),
    contender(FIO, Peer::Fio),
];
const THREE: [Contender; 3] = [ALL[0], ALL[1], ALL[3]];
const BACKENDS: [Contender; 2] = [ALL[0], ALL[1]];
const WITH_POLLING: [Contender; 4] = [ALL[0], contender(POLLING, Peer::Polling), ALL[1], ALL[3]];

const BLOCK: usize = 4096;
const LONG: usize = 128 << 10;

fn load(pattern: Pattern, depth: usize) -> Load {
    let long = matches!(pattern, Pattern::SequentialRead | Pattern::SequentialWrite);
    Load { pattern, size: if long { LONG } else { BLOCK }, depth, queues: 1, polled: false, indirect: false }
}

/// How a load is called in the names of cases.
pub(crate) fn words(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::RandomRead => "4 KiB random read",
        Pattern::RandomWrite => "4 KiB random write",
        Pattern::SequentialRead => "128 KiB sequential read",
        Pattern::SequentialWrite => "128 KiB sequential write",
        Pattern::Mixed => "4 KiB mixed 70/30",
        Pattern::FlushHeavy => "4 KiB random write, a flush each 8",
    }
}

fn name(medium: Medium, load: Load) -> String {
    let medium = match medium {
        Medium::Cached => "page-cached",
        Medium::Tmpfs => "tmpfs",
        Medium::Direct => "O_DIRECT",
    };
    let queues = if load.queues == 1 { String::new() } else { format!(", {} queues", load.queues) };
    let polled = if load.polled { ", polled" } else { "" };
    let indirect = if load.indirect { ", indirect" } else { "" };
    format!("{medium} {}, QD {}{queues}{polled}{indirect}", words(load.pattern), load.depth)
}

/// All cases, in the order in which they are measured.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |medium, load: Load, contenders: &[Contender]| {
        cases.push(Case { name: name(medium, load), medium, load, contenders: contenders.to_vec() });
    };
    use Medium::{Cached, Direct, Tmpfs};
    use Pattern::{FlushHeavy, Mixed, RandomRead, RandomWrite, SequentialRead, SequentialWrite};
    for depth in [1, 32, 128] {
        add(Cached, load(RandomRead, depth), &ALL);
        add(Cached, load(RandomWrite, depth), &THREE);
    }
    add(Cached, Load { indirect: true, ..load(RandomRead, 128) }, &BACKENDS);
    add(Cached, Load { polled: true, ..load(RandomRead, 128) }, &BACKENDS);
    for queues in [2, 3, 4] {
        add(Cached, Load { queues, ..load(RandomRead, 128) }, &THREE);
    }
    add(Cached, load(Mixed, 32), &THREE);
    add(Cached, load(FlushHeavy, 32), &BACKENDS);
    for medium in [Cached, Direct] {
        add(medium, load(SequentialRead, 16), &THREE);
        add(medium, load(SequentialWrite, 16), &THREE);
    }
    for pattern in [RandomRead, RandomWrite] {
        add(Tmpfs, Load { polled: true, ..load(pattern, 128) }, &WITH_POLLING);
    }
    add(Tmpfs, load(RandomRead, 128), &BACKENDS);
    add(Direct, load(RandomRead, 1), &WITH_POLLING);
    for depth in [32, 128] {
        add(Direct, load(RandomRead, depth), &THREE);
        add(Direct, load(RandomWrite, depth), &THREE);
    }
    add(Direct, load(FlushHeavy, 32), &BACKENDS);
    cases.extend(engine());
    cases
}

/// Cases of vhost-remap against itself.
fn engine() -> Vec<Case> {
    let on = |name, peer, area| Contender { area, ..contender(name, peer) };
    let beside = |name, beside| Contender { beside, ..contender(name, Peer::Empty) };
    let first = Area { first: 0, count: REMAPS, stride: 1 };
    let behind = Area { first: REMAPS, ..first };
    // Each of them has a remapped one on either side.
    let odd = Area { first: 1, count: 2 * REMAPS - 2, stride: 2 };
    let groups: [(&str, Vec<Contender>); 6] = [
        ("engine", vec![contender(PASSTHROUGH, Peer::Passthrough), contender(EMPTY, Peer::Empty)]),
        ("remaps elsewhere", vec![on(EMPTY, Peer::Empty, behind), on(NONE_HIT, Peer::InOrder, behind)]),
        ("remaps between", vec![on(EMPTY, Peer::Empty, odd), on(BETWEEN, Peer::Between, odd)]),
        ("remaps hit", vec![on(NOT_REMAPPED, Peer::InOrder, behind), on(HIT, Peer::InOrder, first)]),
        (
            "beside",
            vec![
                contender(UNDISTURBED, Peer::Empty),
                beside(STATUS_ASKED, Beside::Status),
                beside("healer at work", Beside::Healer),
            ],
        ),
        ("scan", vec![contender(NO_PASS, Peer::Empty), beside(PASS, Beside::Scan)]),
    ];
    let mut cases = Vec::new();
    for (group, contenders) in groups {
        let loads = match group {
            "beside" => vec![load(Pattern::RandomRead, 32)],
            "scan" => vec![load(Pattern::RandomRead, 1), load(Pattern::RandomRead, 32)],
            _ => vec![load(Pattern::RandomRead, 128), load(Pattern::RandomWrite, 128)],
        };
        for load in loads {
            // Slots never go through the page cache, and can only be compared with what does not either.
            // And a pass that the page cache answers takes nothing from anybody.
            let medium = if matches!(group, "remaps hit" | "scan") { Medium::Direct } else { Medium::Cached };
            let name = format!("{group}: {}", name(medium, load));
            cases.push(Case { name, medium, load, contenders: contenders.clone() });
        }
    }
    cases
}
