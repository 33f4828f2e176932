//! What opening must come to, from what was done to the seats.

use std::collections::BTreeMap;

use crate::damage::Copy;
use crate::seat::{At, Entry, Kind, Seat, age, clean, live_entries, poisoned, retired};

/// A refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    NotAVolume,
    NoSuperblock,
    OldSpare,
    TablePage(u32),
    /// No place is left that takes writes.
    Io,
}

/// How often an event may come.
pub(crate) type Times = std::ops::RangeInclusive<usize>;

/// An open volume.
#[derive(Clone, Debug, Default)]
pub(crate) struct Opens {
    pub(crate) map: Vec<Entry>,
    pub(crate) poisoned: bool,
    /// Every copy of the poison page was bad, or every copy on one device after an unclean end.
    pub(crate) poison_unknown: bool,
    /// Of the superblock it was opened with.
    pub(crate) generation: u64,
    /// Sequences when it is open, by table page.
    pub(crate) sequences: Vec<u64>,
    /// `metadata-repaired` events, by the name of the copy.
    pub(crate) repaired: BTreeMap<String, Times>,
    /// `metadata-damaged` events.
    pub(crate) damaged: Vec<String>,
    /// The same at the next start.
    pub(crate) damaged_still: Vec<String>,
    /// Places retired by this opening.
    pub(crate) retired: Vec<At>,
    /// Places that count again.
    pub(crate) restored: Vec<At>,
    /// Places that count afterwards.
    pub(crate) live: Vec<At>,
}

fn newest<'a, 'c>(copies: impl Iterator<Item = &'c Copy<'a>>) -> Option<(u64, &'a [u8])>
where
    'a: 'c,
{
    copies.filter_map(|copy| Some((age(copy.seat.kind, copy.whole?), copy.whole?))).max_by_key(|(age, _)| *age)
}

fn is_superblock(kind: Kind) -> bool {
    matches!(kind, Kind::Superblock(_))
}

/// Which of its two copies a generation is written to.
fn copy_of(generation: u64) -> u8 {
    u8::from(generation % 2 == 1)
}

/// The generation that counts, the places it retires, and whether it closed the volume.
fn superblock(copies: &[Copy<'_>]) -> Result<(u64, u32, bool), Refusal> {
    let of = |label: bool| {
        copies.iter().filter(move |copy| (copy.seat.at == At::Label) == label && is_superblock(copy.seat.kind))
    };
    let Some((generation, bytes)) = newest(of(false)) else {
        let recognised = of(false).any(|copy| copy.ours);
        return Err(if recognised { Refusal::NoSuperblock } else { Refusal::NotAVolume });
    };
    // A label that is ahead knows of a generation that the spare must have had.
    let Some((ahead, label)) = newest(of(true)).filter(|(label, _)| *label > generation) else {
        return Ok((generation, retired(bytes), clean(bytes)));
    };
    let written = |copy: &&Copy<'_>| {
        copy.seat.kind == Kind::Superblock(copy_of(ahead)) && retired(label) & copy.seat.at.bit() == 0
    };
    let lost = of(false).filter(written).all(|copy| copy.whole.is_none());
    if lost { Ok((ahead, retired(label), clean(label))) } else { Err(Refusal::OldSpare) }
}

/// The places that take what this opening writes to them.
fn willing(copies: &[Copy<'_>], at: At) -> bool {
    copies
        .iter()
        .all(|copy| !copy.dead || copy.seat.at != at || matches!(copy.seat.kind, Kind::Poison | Kind::Counters))
}

/// What opening comes to.
pub(crate) fn expect(copies: &[Copy<'_>], pages: u32) -> Result<Opens, Refusal> {
    let (generation, retired, clean) = superblock(copies)?;
    let counted: Vec<At> = At::PLACES.into_iter().filter(|at| retired & at.bit() == 0).collect();
    let mut opens = Opens { generation, ..Opens::default() };
    let on_places = |is: &dyn Fn(Kind) -> bool| -> Vec<&Copy<'_>> {
        copies.iter().filter(|copy| counted.contains(&copy.seat.at) && is(copy.seat.kind)).collect()
    };
    // Copies that lack something, in any place that counts.
    let mut lacking: Vec<&Copy<'_>> = Vec::new();
    for copy in on_places(&is_superblock) {
        let current = copy.seat.kind == Kind::Superblock(copy_of(generation));
        let old = |bytes| current && age(copy.seat.kind, bytes) != generation;
        if copy.whole.is_none_or(old) {
            lacking.push(copy);
        }
    }
    for number in 0..pages {
        let homes = on_places(&|kind| matches!(kind, Kind::Table(_, of) if of == number));
        let (sequence, page) = newest(homes.iter().copied()).ok_or(Refusal::TablePage(number))?;
        // Beyond what a home may hold that gives nothing.
        let hidden = homes.iter().any(|copy| copy.whole.is_none());
        opens.sequences.push(sequence + if hidden { 1 << 32 } else { 0 });
        opens.map.extend(live_entries(number, page));
        lacking.extend(
            homes.into_iter().filter(|copy| copy.whole.is_none_or(|page| age(copy.seat.kind, page) != sequence)),
        );
    }
    opens.map.sort_unstable();
    let poisons = copies.iter().filter(|copy| copy.seat.kind == Kind::Poison);
    let note = newest(poisons.clone());
    let silent = |label: bool| {
        let of = || poisons.clone().filter(|copy| (copy.seat.at == At::Label) == label);
        // What takes nothing may have had nothing.
        of().any(|copy| !copy.dead) && of().all(|copy| copy.whole.is_none())
    };
    let noted = poisons.clone().filter_map(|copy| copy.whole).any(poisoned);
    opens.poison_unknown = note.is_none() || (!clean && !noted && (silent(true) || silent(false)));
    opens.poisoned = opens.poison_unknown || note.is_some_and(|(_, page)| poisoned(page));
    let counters = on_places(&|kind| kind == Kind::Counters);
    let saved = newest(counters.iter().copied()).map(|(sequence, _)| sequence);
    lacking.extend(
        counters
            .into_iter()
            .filter(|copy| copy.whole.map(|page| age(copy.seat.kind, page)) != saved || copy.whole.is_none()),
    );
    lacking.extend(
        // A note of what nobody knows is newer than all of them.
        poisons.filter(|copy| {
            let newest = note.map(|note| note.0).filter(|_| !opens.poison_unknown);
            copy.whole.is_none_or(|page| Some(age(Kind::Poison, page)) != newest)
        }),
    );
    opens.retired = counted.iter().copied().filter(|at| !willing(copies, *at)).collect();
    opens.restored = At::PLACES.into_iter().filter(|at| !counted.contains(at) && willing(copies, *at)).collect();
    opens.live = counted.into_iter().filter(|at| !opens.retired.contains(at)).chain(opens.restored.clone()).collect();
    if opens.live.is_empty() {
        return Err(Refusal::Io);
    }
    for copy in lacking {
        let name = copy.seat.name();
        let needed = copy.seat.at != At::Label && !matches!(copy.seat.kind, Kind::Poison | Kind::Counters);
        match (copy.dead, needed) {
            (true, false) => opens.damaged.push(name),
            (true, true) => {}
            // Before or after the write that the place did not take.
            (false, true) if opens.retired.contains(&copy.seat.at) => _ = opens.repaired.insert(name, 0..=1),
            (false, _) => _ = opens.repaired.insert(name, 1..=1),
        }
    }
    // The label's are written anew with its list, which is not done while no flush is possible.
    let of_label = copies.iter().filter(|copy| copy.seat.at == At::Label && is_superblock(copy.seat.kind));
    let mut left: Vec<String> = Vec::new();
    for copy in of_label.filter(|copy| copy.whole.is_none()) {
        opens.damaged.push(copy.seat.name());
        if copy.dead || opens.poisoned {
            left.push(copy.seat.name());
        } else {
            opens.repaired.insert(copy.seat.name(), 1..=1);
        }
    }
    let restored = |copy: &&Copy<'_>| copy.seat.kind == Kind::Counters && opens.restored.contains(&copy.seat.at);
    opens.damaged.extend(copies.iter().filter(restored).filter(|copy| copy.dead).map(|copy| copy.seat.name()));
    opens.damaged.sort();
    // Nobody looks for the counters of a place that does not count.
    let looked_at = |name: &&String| {
        let gone =
            |at: &At| !opens.live.contains(at) && **name == Seat { at: *at, kind: Kind::Counters, offset: 0 }.name();
        !At::PLACES.iter().any(gone)
    };
    let is_left = |name: &&String| left.contains(name) || !opens.repaired.contains_key(*name);
    opens.damaged_still = opens.damaged.iter().filter(looked_at).filter(is_left).cloned().collect();
    Ok(opens)
}
