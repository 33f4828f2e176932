//! Guest memory: which guest addresses are mapped where in this process.
//!
//! A [`MemoryMap`] is immutable; adding or removing a region makes a new one that shares the other
//! mappings. Whoever holds host addresses obtained from a map holds an `Arc` of it, so a mapping goes
//! away only after the last user of its addresses.

use std::any::Any;
use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{FileType, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Memory slots offered to front-ends. QEMU never shrinks the number over a reconnect; 509 is what
/// libvhost-user and rust-vmm offer.
pub const REGIONS_MAX: usize = 509;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Sizes and addresses that do not add up, or more than [`REGIONS_MAX`] regions.
    #[error("region of {len:#x} bytes at guest address {guest:#x}: {reason}")]
    Region {
        /// Guest physical address.
        guest: u64,
        /// Bytes.
        len: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The file cannot be mapped.
    #[error("guest memory at {guest:#x} cannot be mapped: {source}")]
    Map {
        /// Guest physical address.
        guest: u64,
        /// The system's word.
        source: rustix::io::Errno,
    },
}

/// Where the front-end says a region is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionAddress {
    /// Guest physical address: what descriptors carry.
    pub guest: u64,
    /// The front-end's own address: what ring addresses are given in.
    pub user: u64,
    /// Bytes.
    pub len: u64,
    /// Start in the file.
    pub offset: u64,
}

impl RegionAddress {
    /// As a message has it.
    pub(super) fn of(region: &VhostUserMemoryRegion) -> RegionAddress {
        RegionAddress {
            guest: region.guest_phys_addr,
            user: region.user_addr,
            len: region.memory_size,
            offset: region.mmap_offset,
        }
    }
}

/// A file mapping of our own.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is an address range; this module only unmaps it, on drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `Mapping::new` and every user of its addresses holds the Arc
        // this mapping lives in, so nobody uses them any more.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len) } {
            log::error!("guest memory of {:#x} bytes cannot be unmapped: {error}", self.len);
        }
    }
}

impl Mapping {
    /// Map `[0, align_up(len))` bytes of `file` from the page-aligned `offset`.
    pub(super) fn new(file: &File, offset: u64, len: usize) -> Result<Mapping, rustix::io::Errno> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, flags, file.as_fd(), offset)? };
        Ok(Mapping { start: NonNull::new(start.cast()).expect("mmap never succeeds with address 0"), len })
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

/// Which file a region comes from: the same region sent again keeps its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileIdentity {
    device: u64,
    inode: u64,
}

/// A piece of host memory behind a guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Host address.
    pub(crate) ptr: *mut u8,
    /// Bytes, at least 1.
    pub(crate) len: u64,
    /// The bit of its region.
    pub(crate) region: RegionBits,
}

/// A set of regions, as bits; regions beyond 64 share bits, so the set may say more than it should,
/// never less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionBits(pub u64);

impl RegionBits {
    /// Both sets together.
    pub fn union(self, other: RegionBits) -> RegionBits {
        RegionBits(self.0 | other.0)
    }

    /// Whether the sets share a region.
    pub fn intersects(self, other: RegionBits) -> bool {
        self.0 & other.0 != 0
    }
}

#[derive(Clone)]
struct Region {
    address: RegionAddress,
    host: *mut u8,
    bit: RegionBits,
    file: Option<FileIdentity>,
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `host` is an address that `owner`, Send and Sync itself, keeps mapped; it is dereferenced only
// behind the unsafe contracts of the modules that use pieces.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// The guest's memory at one time.
#[derive(Clone, Default)]
pub struct MemoryMap {
    /// Sorted by guest address, disjoint.
    regions: Vec<Region>,
    /// Regions ever added to this map and its ancestors: gives each region its bit.
    added: u32,
}

impl MemoryMap {
    /// No memory.
    pub fn new() -> MemoryMap {
        MemoryMap::default()
    }

    /// This map and one region more.
    ///
    /// # Errors
    /// When the region overlaps another, reaches beyond its file, or cannot be mapped.
    pub fn with_region(&self, address: RegionAddress, file: &File) -> Result<MemoryMap, MemoryError> {
        let refuse = |reason| MemoryError::Region { guest: address.guest, len: address.len, reason };
        self.check_room(&address).map_err(refuse)?;
        let failed = |source| MemoryError::Map { guest: address.guest, source };
        let stat = fstat(file).map_err(failed)?;
        let file_end = address.offset.checked_add(address.len).ok_or_else(|| refuse("the file offset overflows"))?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && file_end > size {
            // A mapping beyond the end of the file would end this process with SIGBUS at the first access.
            return Err(refuse("it reaches beyond the end of its file"));
        }
        // Offsets need not be page-aligned (virtio-driver's are not), those of mappings do. hugetlbfs counts
        // in huge pages and says so in st_blksize.
        let page = u64::try_from(stat.st_blksize).unwrap_or(4096).next_power_of_two().max(4096);
        let lead = address.offset % page;
        let len = lead
            .checked_add(address.len)
            .and_then(|len| len.checked_next_multiple_of(page))
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(|| refuse("it is too long"))?;
        let mapping = Mapping::new(file, address.offset - lead, len).map_err(failed)?;
        let host = mapping.start.as_ptr().wrapping_add(usize::try_from(lead).expect("less than a page"));
        let identity = FileIdentity { device: stat.st_dev, inode: stat.st_ino };
        Ok(self.with(address, host, Some(identity), Arc::new(mapping)))
    }

    /// This map without the region at that address; also says which bits the region had.
    ///
    /// The spec has no offset in the removal; guest address, front-end address and length name a region.
    pub fn without_region(&self, address: RegionAddress) -> Option<(MemoryMap, RegionBits)> {
        let index = self.regions.iter().position(|region| {
            let known = region.address;
            (known.guest, known.user, known.len) == (address.guest, address.user, address.len)
        })?;
        let mut map = self.clone();
        let region = map.regions.remove(index);
        Some((map, region.bit))
    }

    /// A map of exactly these regions, keeping the mappings of those that are in this map already; also says
    /// which regions of this map are gone.
    ///
    /// # Errors
    /// As [`MemoryMap::with_region`].
    pub fn replaced_by(&self, regions: &[(RegionAddress, File)]) -> Result<(MemoryMap, RegionBits), MemoryError> {
        let mut map = MemoryMap { regions: Vec::new(), added: self.added };
        for (address, file) in regions {
            let identity = fstat(file)
                .map(|stat| FileIdentity { device: stat.st_dev, inode: stat.st_ino })
                .map_err(|source| MemoryError::Map { guest: address.guest, source })?;
            let known = self.regions.iter().find(|r| r.address == *address && r.file == Some(identity));
            match known {
                Some(region) => {
                    map.check_room(address).map_err(|reason| MemoryError::Region {
                        guest: address.guest,
                        len: address.len,
                        reason,
                    })?;
                    map.insert(region.clone());
                }
                None => map = map.with_region(*address, file)?,
            }
        }
        let gone = self.regions.iter().filter(|old| !map.regions.iter().any(|new| new.host == old.host));
        let bits = gone.fold(RegionBits::default(), |bits, region| bits.union(region.bit));
        Ok((map, bits))
    }

    /// The memory of a rust-vmm map, where front-end and guest addresses are the same.
    pub fn of_guest_memory(memory: &Arc<GuestMemoryMmap>) -> MemoryMap {
        let mut map = MemoryMap::new();
        for region in memory.iter() {
            let guest = region.start_addr().raw_value();
            let address = RegionAddress { guest, user: guest, len: region.len(), offset: 0 };
            map = map.with(address, region.as_ptr(), None, memory.clone());
        }
        map
    }

    /// Number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The host memory behind guest address `guest`: as much of `len` bytes as one region holds. `cache` is
    /// the index of the region that was used last.
    #[inline]
    pub(crate) fn piece(&self, cache: &mut usize, guest: u64, len: u64) -> Option<Piece> {
        let region = match self.regions.get(*cache) {
            Some(region) if region.holds(guest) => region,
            _ => {
                let after = self.regions.partition_point(|region| region.address.guest <= guest);
                let index = after.checked_sub(1)?;
                let region = self.regions.get(index).filter(|region| region.holds(guest))?;
                *cache = index;
                region
            }
        };
        let offset = guest - region.address.guest;
        let ptr = region.host.wrapping_add(usize::try_from(offset).ok()?);
        (len > 0).then_some(Piece { ptr, len: len.min(region.address.len - offset), region: region.bit })
    }

    /// The host memory of `len` bytes at the front-end's address `user`, which must lie in one region: rings
    /// are addressed like arrays.
    pub(crate) fn user_range(&self, user: u64, len: u64) -> Option<Piece> {
        let region = self.regions.iter().find(|r| {
            let end = user.checked_add(len);
            r.address.user <= user && end.is_some_and(|end| end <= r.address.user.saturating_add(r.address.len))
        })?;
        let ptr = region.host.wrapping_add(usize::try_from(user - region.address.user).ok()?);
        (len > 0).then_some(Piece { ptr, len, region: region.bit })
    }

    /// Call `each` with the guest address and the length of every part of `len` bytes at the host address `ptr`;
    /// what is no memory of this map is left out.
    pub(super) fn guest_ranges(&self, ptr: *const u8, len: usize, mut each: impl FnMut(u64, u64)) {
        let bytes = |n: usize| u64::try_from(n).expect("a usize fits in 64 bits");
        let (start, end) = (bytes(ptr.addr()), bytes(ptr.addr()) + bytes(len));
        for region in &self.regions {
            let host = bytes(region.host.addr());
            let (from, to) = (start.max(host), end.min(host + region.address.len));
            if from < to {
                each(region.address.guest + (from - host), to - from);
            }
        }
    }

    /// Copy `to.len()` bytes from guest address `guest`; `None` where some of them are not memory.
    pub(crate) fn read(&self, cache: &mut usize, guest: u64, to: &mut [u8]) -> Option<()> {
        let mut done = 0_usize;
        while done < to.len() {
            let at = guest.checked_add(u64::try_from(done).ok()?)?;
            let piece = self.piece(cache, at, u64::try_from(to.len() - done).ok()?)?;
            let n = usize::try_from(piece.len).ok()?;
            // SAFETY: the piece is `n` bytes of a region that this map keeps mapped; guest memory is foreign
            // to every local slice, so the two do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(piece.ptr, to.get_mut(done..)?.as_mut_ptr(), n) };
            done += n;
        }
        Some(())
    }

    fn check_room(&self, address: &RegionAddress) -> Result<(), &'static str> {
        let end = address.guest.checked_add(address.len).ok_or("its guest address overflows")?;
        address.user.checked_add(address.len).ok_or("its front-end address overflows")?;
        if address.len == 0 {
            return Err("it is empty");
        }
        if self.regions.len() >= REGIONS_MAX {
            return Err("there are too many regions");
        }
        let overlaps = |r: &Region| r.address.guest < end && address.guest < r.address.guest + r.address.len;
        if self.regions.iter().any(overlaps) {
            return Err("it overlaps another one");
        }
        Ok(())
    }

    fn with(
        &self,
        address: RegionAddress,
        host: *mut u8,
        file: Option<FileIdentity>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> MemoryMap {
        let mut map = self.clone();
        let bit = RegionBits(1_u64 << (map.added % u64::BITS));
        map.added = map.added.wrapping_add(1);
        map.insert(Region { address, host, bit, file, owner });
        map
    }

    fn insert(&mut self, region: Region) {
        let index = self.regions.partition_point(|other| other.address.guest < region.address.guest);
        self.regions.insert(index, region);
    }
}

impl Region {
    fn holds(&self, guest: u64) -> bool {
        guest.checked_sub(self.address.guest).is_some_and(|offset| offset < self.address.len)
    }
}

impl std::fmt::Debug for MemoryMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.regions.iter().map(|region| (region.address, Arc::strong_count(&region.owner))))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn at(guest: u64, user: u64, len: u64, offset: u64) -> RegionAddress {
        RegionAddress { guest, user, len, offset }
    }

    #[test]
    fn unaligned_regions_are_mapped_at_their_offset() {
        use std::os::unix::fs::FileExt;
        let file = file(16384);
        file.write_all_at(b"here", 5000).unwrap();
        let map = MemoryMap::new().with_region(at(0x1000, 0x1000, 100, 5000), &file).unwrap();
        let mut bytes = [0_u8; 4];
        map.read(&mut 0, 0x1000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        assert_eq!(map.read(&mut 0, 0x1000 + 97, &mut bytes), None);
        assert_eq!(map.read(&mut 0, u64::MAX, &mut bytes), None);
    }

    #[test]
    fn a_read_crosses_adjacent_regions_and_stops_at_a_hole() {
        let file = file(12288);
        let map = MemoryMap::new().with_region(at(0, 0, 4096, 0), &file).unwrap();
        let map = map.with_region(at(4096, 1 << 40, 4096, 8192), &file).unwrap();
        let mut bytes = [1_u8; 8];
        map.read(&mut 0, 4092, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8]);
        assert_eq!(map.read(&mut 0, 8188, &mut bytes), None);
        assert!(map.user_range(4092, 8).is_none(), "a ring lies in one region");
        assert!(map.user_range((1 << 40) + 4000, 96).is_some());
    }

    #[test]
    fn bad_regions_are_refused() {
        let file = file(8192);
        let map = MemoryMap::new().with_region(at(0, 0, 8192, 0), &file).unwrap();
        assert!(map.with_region(at(4096, 0, 4096, 0), &file).is_err(), "overlap");
        assert!(map.with_region(at(1 << 20, 0, 8193, 0), &file).is_err(), "beyond the file");
        assert!(map.with_region(at(1 << 20, 0, 4096, u64::MAX - 4096), &file).is_err(), "offset");
        assert!(map.with_region(at(u64::MAX - 10, 0, 4096, 0), &file).is_err(), "guest address");
        assert!(map.with_region(at(1 << 20, 0, 0, 0), &file).is_err(), "empty");
    }

    #[test]
    fn a_table_sent_again_keeps_its_mappings() {
        let file = file(8192);
        let (a, b) = (at(0, 0, 4096, 0), at(4096, 4096, 4096, 4096));
        let clone = || file.try_clone().unwrap();
        let (map, gone) = MemoryMap::new().replaced_by(&[(a, clone()), (b, clone())]).unwrap();
        assert_eq!(gone, RegionBits(0));
        let (same, gone) = map.replaced_by(&[(b, clone()), (a, clone())]).unwrap();
        assert_eq!((same.len(), gone), (2, RegionBits(0)));
        let (less, gone) = same.replaced_by(&[(b, clone())]).unwrap();
        assert_eq!((less.len(), gone), (1, RegionBits(1)));
        assert!(less.without_region(a).is_none());
        assert!(less.without_region(b).unwrap().0.is_empty());
    }
}
