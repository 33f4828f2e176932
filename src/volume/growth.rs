//! What a superblock says of a volume that grows: its label moves with the end of its primary, and the old one becomes
//! zeros before the guest sees them.

use super::layout::{LabelLayout, PAGE_SIZE};
use super::superblock::{Region, Superblock};
use crate::units::SECTOR_SIZE;

impl Region {
    /// [`Region::kind`] of the guest's data.
    pub const GUEST: u32 = 4;
    /// [`Region::kind`] of the label.
    pub const LABEL: u32 = 5;
    /// [`Region::kind`] of an old label.
    pub const OLD_LABEL: u32 = 6;
}

impl Superblock {
    /// Labels that were left behind by one that moved, and are not known to be zeros.
    pub fn old_labels(&self) -> impl Iterator<Item = Region> + '_ {
        self.regions.iter().copied().filter(|region| region.kind == Region::OLD_LABEL)
    }

    /// Whether nothing that counts lies there.
    pub(super) fn may_be_zeros(&self, Region { device, start, length, .. }: Region) -> bool {
        let after = match self.labelled {
            true => LabelLayout::new(self.primary_size, self.max_remaps).map_or(0, |label| label.start),
            false => self.primary_size,
        };
        let whole = start.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
        device == 0
            && whole
            && start >= self.capacity * SECTOR_SIZE
            && start.checked_add(length).is_some_and(|end| end <= after)
    }

    /// The label lies at the end of a primary of `primary_size` bytes from now on, and the old one is to be zeroed.
    pub fn move_label(&mut self, old: LabelLayout, new: LabelLayout, primary_size: u64) {
        self.primary_size = primary_size;
        for region in self.regions.iter_mut().filter(|region| region.kind == Region::LABEL) {
            region.start = new.start;
        }
        let length = old.end() - old.start;
        self.regions.push(Region { kind: Region::OLD_LABEL, device: 0, start: old.start, length });
    }

    /// The guest sees `capacity` sectors from now on, of a primary of `primary_size` bytes. Old labels are zeros.
    pub fn grow(&mut self, capacity: u64, primary_size: u64) {
        (self.capacity, self.primary_size) = (capacity, primary_size);
        self.regions.retain(|region| region.kind != Region::OLD_LABEL);
        for region in self.regions.iter_mut().filter(|region| region.kind == Region::GUEST) {
            region.length = capacity * SECTOR_SIZE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::superblock::tests::sample;
    use crate::volume::superblock::{Seat, SuperblockError};

    #[test]
    fn an_old_label_is_believed_only_beyond_the_capacity() {
        let end = 100 << 20;
        let layout = |size| LabelLayout::new(size, 16).unwrap();
        let superblock = |start, length| Superblock {
            capacity: 2048,
            primary_size: end,
            max_remaps: 16,
            regions: vec![Region { kind: Region::OLD_LABEL, device: 0, start, length }],
            ..sample()
        };
        let decode = |superblock: &Superblock| {
            Superblock::decode(&superblock.encode(Seat::Label, 0), Seat::Label, 0)
                .map(|found| assert_eq!(found, *superblock))
        };
        let label = layout(end).start;
        for (start, length) in [(1 << 20, 1 << 20), (1 << 20, label - (1 << 20)), (label - PAGE_SIZE, PAGE_SIZE)] {
            assert_eq!(decode(&superblock(start, length)), Ok(()), "{start} {length}");
        }
        let impossible = Err(SuperblockError::Field("old label"));
        for (start, length) in [
            ((1 << 20) - PAGE_SIZE, 1 << 20),
            (label - PAGE_SIZE, 2 * PAGE_SIZE),
            (1 << 20, u64::MAX - PAGE_SIZE + 1),
            ((1 << 20) + 512, PAGE_SIZE),
            (1 << 20, 512),
        ] {
            assert_eq!(decode(&superblock(start, length)), impossible, "{start} {length}");
        }
        let on_the_spare = Region { kind: Region::OLD_LABEL, device: 1, start: 1 << 20, length: 1 << 20 };
        assert_eq!(decode(&Superblock { regions: vec![on_the_spare], ..superblock(0, 0) }), impossible);
        // As a volume that grows has it.
        let made = 2 << 20;
        let mut grown = Superblock { primary_size: made, regions: Vec::new(), ..superblock(0, 0) };
        grown.move_label(layout(made), layout(end), end);
        assert_eq!(decode(&grown), Ok(()));
        assert_eq!(grown.old_labels().map(|old| (old.start, old.length)).collect::<Vec<_>>(), [(1 << 20, 1 << 20)]);
        grown.grow(4096, end);
        assert_eq!((grown.old_labels().count(), grown.capacity), (0, 4096));
    }
}
