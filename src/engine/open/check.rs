//! Whether the devices are those of the volume, and as it left them.

use super::superblocks::{self, Label};
use super::{DeviceFacts, OpenError, OpenParams, sample};
use crate::device::DeviceIndex;
use crate::engine::io::Io;
use crate::volume::superblock::{CloseStamp, Superblock};

/// Refuse devices that are smaller than the volume was made with.
pub(super) fn check_devices(
    superblock: &Superblock,
    primary: &DeviceFacts,
    spare: &DeviceFacts,
) -> Result<(), OpenError> {
    let (found, expected) = (spare.size, superblock.spare_size);
    if found < expected {
        return Err(OpenError::Shrunk { device: DeviceIndex::SPARE, found, expected });
    }
    let (found, expected) = (primary.size, superblock.primary_size);
    if found < expected {
        return Err(OpenError::Shrunk { device: DeviceIndex::PRIMARY, found, expected });
    }
    for (device, facts) in [(DeviceIndex::PRIMARY, primary), (DeviceIndex::SPARE, spare)] {
        if facts.logical_block > superblock.logical_block {
            let (found, expected) = (facts.logical_block, superblock.logical_block);
            return Err(OpenError::LogicalBlock { device, found, expected });
        }
    }
    Ok(())
}

/// See to it that a primary that has grown has its label where the spare looks for it, and none of a later time at its
/// end: a resize that went further has been forgotten by an older spare.
pub(super) async fn check_grown(
    io: &Io,
    superblock: &Superblock,
    label: Option<&Label>,
    params: &OpenParams,
) -> Result<(), OpenError> {
    let (found, expected) = (params.primary.size, superblock.primary_size);
    let Some(label) = label.filter(|_| found > expected) else { return Ok(()) };
    let moved = Superblock { primary_size: found, ..superblock.clone() };
    let at_end = superblocks::read_label(io, &moved).await?;
    let later = at_end.as_ref().and_then(Label::newest).filter(|later| later.set == superblock.set);
    match later.filter(|later| later.generation > superblock.generation) {
        Some(later) => Err(OpenError::OldSpare { spare: superblock.generation, primary: later.generation }),
        None if label.newest().is_none() => Err(OpenError::Grown { found, expected }),
        None => Ok(()),
    }
}

/// Refuse a primary that is not the adopted one, or that somebody else has changed since the last clean close
/// while blocks of it are remapped.
pub(super) async fn check_content(
    io: &Io,
    superblock: &Superblock,
    labelled: bool,
    params: &OpenParams,
    live: usize,
) -> Result<(), OpenError> {
    let facts = &params.primary;
    let same_device = superblocks::same_device(superblock, facts);
    let mut sampled = None;
    if !labelled && !same_device && !params.accept_external {
        let found = sample(io, superblock.capacity, superblock.logical_block, superblock.sampled).await;
        sampled = Some(found);
        if superblock.stamp.is_none_or(|stamp| (stamp.sample_crc, superblock.sampled) != found) {
            return Err(OpenError::NotAdopted(superblock.set));
        }
    }
    let unchanged = |_: &CloseStamp| superblock.clean && live > 0 && !params.accept_external;
    let Some(stamp) = superblock.stamp.filter(unchanged) else { return Ok(()) };
    if stamp.size != facts.size {
        return Err(OpenError::OtherSize { found: facts.size, expected: stamp.size, live });
    }
    if stamp.mtime_ns != 0 && same_device && stamp.mtime_ns != facts.mtime_ns {
        return Err(OpenError::External("its modification time differs", live));
    }
    let (crc, readable) = match sampled {
        Some(found) => found,
        None => sample(io, superblock.capacity, superblock.logical_block, superblock.sampled).await,
    };
    // Where a sample has become unreadable since, nothing can be said.
    if readable == superblock.sampled && stamp.sample_crc != crc {
        return Err(OpenError::External("sampled blocks differ", live));
    }
    Ok(())
}
