//! Where things lie on the spare, and in the label of a primary that was made by us.
//!
//! ```text
//! spare    | head place | slots ...                          | tail place |
//! place    | superblock 0 | superblock 1 | poison | counters | table home A | table home B |
//! primary  | guest data ...                                       | label |
//! label    | superblock 0 | superblock 1 | poison | unused   | stamped table |
//! ```
//!
//! All pages are 4 KiB. A place never shares a [`REGION_ALIGN`] region with slots, and the two places
//! are as far apart as the spare allows, so that one scratch does not reach a page and its copy.

use crate::units::BLOCK_SIZE;

/// Bytes in a metadata page.
pub const PAGE_SIZE: u64 = 4096;
/// [`PAGE_SIZE`] as a length in memory.
pub const PAGE: usize = 4096;
/// Table entries in a page: 4096 bytes less a header of 32, 8 bytes an entry.
pub const ENTRIES_PER_PAGE: u32 = 508;
/// Places and slots begin and end on multiples of this.
pub const REGION_ALIGN: u64 = 1 << 20;
/// Remaps where the operator does not say: what the predecessor promised.
pub const REMAPS_DEFAULT: u32 = 16_384;
/// The most remaps a volume can have: 16 GiB of slots.
pub const REMAPS_MAX: u32 = 4_194_304;
/// The fewest.
pub const REMAPS_MIN: u32 = 16;

/// Pages before the table in a place and in the label.
const FIXED_PAGES: u64 = 4;

/// A home of table pages within each place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Home {
    /// The first.
    A,
    /// The second.
    B,
}

impl Home {
    /// The home that is not this one.
    pub fn other(self) -> Home {
        match self {
            Home::A => Home::B,
            Home::B => Home::A,
        }
    }

    /// 0 or 1.
    pub fn number(self) -> u8 {
        match self {
            Home::A => 0,
            Home::B => 1,
        }
    }

    /// Both.
    pub const ALL: [Home; 2] = [Home::A, Home::B];
}

/// A place: one full set of metadata on the spare.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// At the spare's start.
    Head,
    /// At its end.
    Tail,
}

impl Place {
    /// Both.
    pub const ALL: [Place; 2] = [Place::Head, Place::Tail];

    /// 0 or 1: its bit in the mask of retired places.
    pub fn number(self) -> u8 {
        match self {
            Place::Head => 0,
            Place::Tail => 1,
        }
    }

    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Place::Head => "head",
            Place::Tail => "tail",
        }
    }
}

/// Byte offsets of everything on the spare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Slots, and entries in the table.
    pub max_remaps: u32,
    /// Pages of the table.
    pub table_pages: u32,
    /// Start of the tail place.
    pub tail_start: u64,
    /// Start of slot 0.
    pub slots_start: u64,
    /// Bytes of the spare, as recorded.
    pub spare_size: u64,
}

/// Why a spare cannot hold the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Too small.
    #[error(
        "the spare has {size} bytes and {max_remaps} remaps need at least {needed}; use a larger one, or fewer with --max-remaps"
    )]
    TooSmall {
        /// Bytes there are.
        size: u64,
        /// Bytes needed.
        needed: u64,
        /// Remaps asked for.
        max_remaps: u32,
    },
    /// An impossible number of remaps.
    #[error("{0} remaps are outside of the possible {REMAPS_MIN} to {REMAPS_MAX}")]
    Remaps(u32),
}

fn align_up(bytes: u64) -> u64 {
    bytes.div_ceil(REGION_ALIGN) * REGION_ALIGN
}

fn table_pages(max_remaps: u32) -> u32 {
    max_remaps.div_ceil(ENTRIES_PER_PAGE)
}

/// Bytes of a place.
pub fn place_len(max_remaps: u32) -> u64 {
    align_up((FIXED_PAGES + 2 * u64::from(table_pages(max_remaps))) * PAGE_SIZE)
}

/// Bytes a spare needs for `max_remaps`.
pub fn spare_size(max_remaps: u32) -> u64 {
    2 * place_len(max_remaps) + align_up(u64::from(max_remaps) * BLOCK_SIZE)
}

/// Bytes of the label on a primary.
pub fn label_size(max_remaps: u32) -> u64 {
    align_up((FIXED_PAGES + u64::from(table_pages(max_remaps))) * PAGE_SIZE)
}

/// Bytes that a labelled primary of `size` bytes needs to take in a guest's disk of `guest_bytes`: as many as it
/// has, or so many that its new label lies behind the old one, which counts until the new one is whole.
pub fn grown_primary(size: u64, guest_bytes: u64, max_remaps: u32) -> u64 {
    let (guest_end, end) = (guest_bytes.next_multiple_of(PAGE_SIZE), size / PAGE_SIZE * PAGE_SIZE);
    let label = label_size(max_remaps);
    if guest_end + label <= end { size } else { guest_end.max(end) + label }
}

impl Layout {
    /// The layout of a spare of `spare_size` bytes.
    ///
    /// # Errors
    /// When it is too small or the number of remaps impossible.
    pub fn new(spare_size_bytes: u64, max_remaps: u32) -> Result<Layout, LayoutError> {
        if !(REMAPS_MIN..=REMAPS_MAX).contains(&max_remaps) {
            return Err(LayoutError::Remaps(max_remaps));
        }
        let needed = spare_size(max_remaps);
        if spare_size_bytes < needed {
            return Err(LayoutError::TooSmall { size: spare_size_bytes, needed, max_remaps });
        }
        let place = place_len(max_remaps);
        let tail_start = spare_size_bytes / REGION_ALIGN * REGION_ALIGN - place;
        let layout = Layout {
            max_remaps,
            table_pages: table_pages(max_remaps),
            tail_start,
            slots_start: place,
            spare_size: spare_size_bytes,
        };
        let slots_end = layout.slots_start + u64::from(max_remaps) * BLOCK_SIZE;
        assert!(slots_end <= tail_start, "slots and the tail place must not overlap");
        Ok(layout)
    }

    fn start(&self, place: Place) -> u64 {
        match place {
            Place::Head => 0,
            Place::Tail => self.tail_start,
        }
    }

    /// Bytes of a place.
    pub fn place_len(&self) -> u64 {
        place_len(self.max_remaps)
    }

    /// First byte of a place.
    pub fn place_start(&self, place: Place) -> u64 {
        self.start(place)
    }

    /// A superblock: `copy` is 0 or 1.
    pub fn superblock(&self, place: Place, copy: u8) -> u64 {
        self.start(place) + u64::from(copy) * PAGE_SIZE
    }

    /// The poison page.
    pub fn poison(&self, place: Place) -> u64 {
        self.start(place) + 2 * PAGE_SIZE
    }

    /// The page of counters and the scanner's cursor.
    pub fn counters(&self, place: Place) -> u64 {
        self.start(place) + 3 * PAGE_SIZE
    }

    /// Table page `page` in one of its homes.
    pub fn table(&self, place: Place, home: Home, page: u32) -> u64 {
        assert!(page < self.table_pages, "table page {page} of {}", self.table_pages);
        let pages = FIXED_PAGES + u64::from(home.number()) * u64::from(self.table_pages) + u64::from(page);
        self.start(place) + pages * PAGE_SIZE
    }
}

/// Byte offsets of the label on the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabelLayout {
    /// First byte.
    pub start: u64,
    /// Pages of the stamped table.
    pub table_pages: u32,
}

impl LabelLayout {
    /// The label of a primary of `device_size` bytes.
    pub fn new(device_size: u64, max_remaps: u32) -> Option<LabelLayout> {
        let start = (device_size / PAGE_SIZE * PAGE_SIZE).checked_sub(label_size(max_remaps))?;
        Some(LabelLayout { start, table_pages: table_pages(max_remaps) })
    }

    /// The byte behind it.
    pub fn end(&self) -> u64 {
        self.start + align_up((FIXED_PAGES + u64::from(self.table_pages)) * PAGE_SIZE)
    }

    /// A superblock: `copy` is 0 or 1.
    pub fn superblock(&self, copy: u8) -> u64 {
        self.start + u64::from(copy) * PAGE_SIZE
    }

    /// The poison page.
    pub fn poison(&self) -> u64 {
        self.start + 2 * PAGE_SIZE
    }

    /// Page `page` of the stamped table.
    pub fn table(&self, page: u32) -> u64 {
        self.start + (FIXED_PAGES + u64::from(page)) * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_at_any_size() {
        for remaps in [REMAPS_MIN, 508, 509, REMAPS_DEFAULT, 1_048_576, REMAPS_MAX] {
            let layout = Layout::new(spare_size(remaps) + 12_345, remaps).unwrap();
            let last = layout.table_pages - 1;
            let head_end = layout.table(Place::Head, Home::B, last) + PAGE_SIZE;
            assert!(head_end <= layout.slots_start);
            assert!(layout.slots_start.is_multiple_of(REGION_ALIGN) && layout.tail_start.is_multiple_of(REGION_ALIGN));
            assert!(layout.slots_start + u64::from(remaps) * BLOCK_SIZE <= layout.tail_start);
            assert!(layout.table(Place::Tail, Home::B, last) + PAGE_SIZE <= layout.spare_size);
        }
    }

    #[test]
    fn a_label_that_moves_lies_behind_the_old_one() {
        let label = label_size(REMAPS_MIN);
        let made = 64 * PAGE_SIZE + label;
        for (size, guest, expected) in [
            // It fits as it is.
            (made, 64 * PAGE_SIZE, made),
            (made + PAGE_SIZE + 512, 65 * PAGE_SIZE - 512, made + PAGE_SIZE + 512),
            // By less than a label, and by more.
            (made, 64 * PAGE_SIZE + 512, made + label),
            (made + 512, 65 * PAGE_SIZE, made + label),
            (made, 64 * PAGE_SIZE + label, made + label),
            (made, 65 * PAGE_SIZE + label, 65 * PAGE_SIZE + 2 * label),
        ] {
            assert_eq!(grown_primary(size, guest, REMAPS_MIN), expected, "{size} {guest}");
            let of = |size| LabelLayout::new(size, REMAPS_MIN).unwrap();
            let (old, new) = (of(size), of(expected));
            assert!(new.start >= guest && (new == old || new.start >= old.end()));
        }
    }

    #[test]
    fn a_byte_too_few_is_refused_with_the_numbers() {
        let needed = spare_size(REMAPS_DEFAULT);
        let error = Layout::new(needed - 1, REMAPS_DEFAULT).unwrap_err();
        assert_eq!(error, LayoutError::TooSmall { size: needed - 1, needed, max_remaps: REMAPS_DEFAULT });
        assert!(error.to_string().contains(&needed.to_string()));
    }
}
