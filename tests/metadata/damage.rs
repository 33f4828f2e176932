//! What can become of a copy of metadata.

use std::fmt;

use crate::rig::{Bad, Random, Reads, Rig};
use crate::seat::{Kind, Seat, checksum_at};
use crate::story::Story;

/// What happened to one seat.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Damage {
    /// Other bytes.
    Random(u64),
    Zero,
    /// One bit of the byte at that offset.
    Flip(usize),
    /// Reads fail until it is written.
    Unreadable,
    /// Reads and writes fail.
    Dead,
    /// What lay there before.
    Older,
    /// What belongs to another seat.
    Misdirected(Seat),
}

impl fmt::Debug for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Damage::Random(_) => f.write_str("random bytes"),
            Damage::Zero => f.write_str("zeros"),
            Damage::Flip(at) => write!(f, "a flipped bit at {at}"),
            Damage::Unreadable => f.write_str("unreadable"),
            Damage::Dead => f.write_str("dead"),
            Damage::Older => f.write_str("an older version"),
            Damage::Misdirected(from) => write!(f, "the content of {from:?}"),
        }
    }
}

/// Everything that can happen to `seat`.
pub(crate) fn damages(story: &Story, moment: usize, seat: &Seat) -> Vec<Damage> {
    // In the magic, in the checksum, in generation or sequence and what is beside them, and at the ends.
    let flips = [0, 7, checksum_at(seat.kind) + 2, 32, 80, 511, 512, 4095].map(Damage::Flip);
    let strays = strays(story, moment, seat).into_iter().map(Damage::Misdirected);
    [different(story, moment, seat), flips.into(), strays.collect()].concat()
}

/// One of each kind of damage, for combinations: how a page comes to be damaged makes no difference there.
pub(crate) fn different(story: &Story, moment: usize, seat: &Seat) -> Vec<Damage> {
    let mut damages = vec![
        Damage::Random(seat.offset + 1),
        Damage::Zero,
        Damage::Unreadable,
        Damage::Dead,
        Damage::Flip(checksum_at(seat.kind)),
        Damage::Flip(200),
    ];
    damages.extend(story.older(moment, seat).map(|_| Damage::Older));
    // The same page of the other place, or whatever comes first.
    let strays = strays(story, moment, seat);
    let twin = strays.iter().find(|stray| stray.kind == seat.kind).or(strays.first());
    damages.extend(twin.map(|stray| Damage::Misdirected(*stray)));
    damages
}

/// Seats whose content may have been written here by mistake: the neighbour before and after, the copy in the
/// other place, the other home or copy of the same place, and the same page of the label.
fn strays(story: &Story, moment: usize, seat: &Seat) -> Vec<Seat> {
    let seats: Vec<Seat> = story.moments[moment].bytes.keys().copied().collect();
    let mut strays: Vec<Seat> = Vec::new();
    for other in &seats {
        let beside = other.device() == seat.device() && other.offset.abs_diff(seat.offset) == 4096;
        let twin = other.kind == seat.kind;
        let sibling = other.at == seat.at
            && match (other.kind, seat.kind) {
                (Kind::Superblock(_), Kind::Superblock(_)) => true,
                (Kind::Table(_, number), Kind::Table(_, of)) => number == of,
                _ => false,
            };
        if other != seat && (beside || twin || sibling) {
            strays.push(*other);
        }
    }
    strays
}

/// A seat after its damage.
#[derive(Clone, Debug)]
pub(crate) struct Copy<'a> {
    pub(crate) seat: Seat,
    /// What lies there, where that is a whole copy.
    pub(crate) whole: Option<&'a [u8]>,
    /// Whether somebody who finds a superblock here damaged can tell that it was one of ours.
    pub(crate) ours: bool,
    /// Takes no writes.
    pub(crate) dead: bool,
}

/// Every seat after `damages`: known from what was done, not from looking.
pub(crate) fn copies<'a>(story: &'a Story, moment: usize, damages: &[(Seat, Damage)]) -> Vec<Copy<'a>> {
    let bytes = &story.moments[moment].bytes;
    let copies = bytes.iter().map(|(seat, whole)| {
        let done = damages.iter().find(|(of, _)| of == seat).map(|(_, damage)| damage);
        let dead = done == Some(&Damage::Dead);
        let (whole, ours) = match done {
            None => (Some(whole.as_slice()), true),
            Some(Damage::Older) => (story.older(moment, seat).map(Vec::as_slice), true),
            Some(Damage::Random(_) | Damage::Zero | Damage::Flip(0..8)) => (None, false),
            Some(Damage::Misdirected(from)) => {
                (None, matches!(from.kind, Kind::Superblock(_)) && from.device() == seat.device())
            }
            Some(Damage::Flip(_) | Damage::Unreadable | Damage::Dead) => (None, true),
        };
        Copy { seat: *seat, whole, ours, dead }
    });
    copies.collect()
}

/// Do it.
pub(crate) fn inflict(rig: &mut Rig, story: &Story, moment: usize, seat: &Seat, damage: Damage) {
    let bytes = &story.moments[moment].bytes;
    match damage {
        Damage::Random(seed) => {
            let mut random = Random::new(seed);
            let words: Vec<u8> = (0..512).flat_map(|_| random.next().to_le_bytes()).collect();
            seat.write(rig, &words);
        }
        Damage::Zero => seat.write(rig, &[0; 4096]),
        Damage::Flip(at) => {
            let mut flipped = bytes[seat].clone();
            flipped[at] ^= 1 << (at % 8);
            seat.write(rig, &flipped);
        }
        Damage::Unreadable | Damage::Dead => {
            let (from, to) = (seat.offset, seat.offset + 4096);
            let dead = damage == Damage::Dead;
            let reads = if dead { Reads::Never } else { Reads::UntilWritten };
            rig.bad.push(Bad { device: seat.device(), from, to, reads, writes: dead });
        }
        Damage::Older => seat.write(rig, story.older(moment, seat).expect("checked when chosen")),
        Damage::Misdirected(from) => seat.write(rig, &bytes[&from]),
    }
}
