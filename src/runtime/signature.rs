//! What a file or device holds already, as far as its first bytes say.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::device::open::{self, OpenError};

/// Bytes looked at, at each end, to decide whether a device is in use.
const LOOK_BYTES: u64 = 1 << 20;

/// A file or device as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// Bytes.
    pub(super) size: u64,
    /// What it holds, if its ends hold anything.
    pub(super) content: Option<Content>,
}

/// What is on a device that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// A disk image in a format of its own, by `qemu-img`'s name for it and a person's.
    Image(&'static str, &'static str),
    /// Something else that has a name.
    Named(&'static str),
    /// Bytes that are not zero.
    Data,
}

impl Content {
    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Content::Image(_, name) | Content::Named(name) => name,
            Content::Data => "some data",
        }
    }
}

/// Look at both ends of a file or block device. Nothing is locked or changed.
pub(super) fn look(path: &Path) -> Result<Found, OpenError> {
    open::kind_of(path)?;
    let mut file = File::open(path).map_err(|error| open::open_failure(path, error))?;
    read_ends(&mut file).map_err(|error| open::io_failure(path, "cannot be looked at", error))
}

/// The format of an image, as far as it can be read: a disk whose first sectors are bad is a disk.
pub(super) fn format_of(path: &Path) -> Option<Content> {
    let mut head = [0; 512];
    open::kind_of(path).ok()?;
    File::open(path).ok()?.read_exact(&mut head).ok()?;
    signature(&head).filter(|content| matches!(content, Content::Image(..)))
}

fn read_ends(file: &mut File) -> io::Result<Found> {
    let size = file.seek(SeekFrom::End(0))?;
    let mut is_zero = true;
    for start in [0, size.saturating_sub(LOOK_BYTES)] {
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        Read::by_ref(file).take(LOOK_BYTES).read_to_end(&mut bytes)?;
        if let Some(content) = (start == 0).then(|| signature(&bytes)).flatten() {
            return Ok(Found { size, content: Some(content) });
        }
        is_zero &= bytes.iter().all(|byte| *byte == 0);
    }
    Ok(Found { size, content: (!is_zero).then_some(Content::Data) })
}

/// What begins with these bytes.
fn signature(head: &[u8]) -> Option<Content> {
    use Content::{Image, Named};
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let known: [(bool, Content); 20] = [
        (at(0, b"VHREMAP1"), Named("a vhost-remap spare")),
        (at(0, b"QFI\xfb"), Image("qcow2", "a qcow2 image")),
        (at(0, b"KDMV") || at(0, b"# Disk DescriptorFile"), Image("vmdk", "a VMDK image")),
        (at(0, b"vhdxfile"), Image("vhdx", "a VHDX image")),
        (at(0, b"conectix"), Image("vpc", "a VHD image")),
        (at(0, b"QED\0"), Image("qed", "a QED image")),
        (at(64, b"\x7f\x10\xda\xbe"), Image("vdi", "a VDI image")),
        (at(0, b"WithoutFreeSpace") || at(0, b"WithouFreSpacExt"), Image("parallels", "a Parallels image")),
        (at(1080, b"\x53\xef"), Named("an ext2/3/4 file system")),
        (at(0, b"XFSB"), Named("an xfs file system")),
        (at(65_600, b"_BHRfS_M"), Named("a btrfs file system")),
        (at(1024, b"\x10\x20\xf5\xf2"), Named("an f2fs file system")),
        (at(0, b"hsqs"), Named("a squashfs file system")),
        (at(0, b"LUKS\xba\xbe"), Named("a LUKS volume")),
        (at(512, b"LABELONE"), Named("an LVM physical volume")),
        (at(4096, b"\xfc\x4e\x2b\xa9") || at(0, b"\xfc\x4e\x2b\xa9"), Named("an md array member")),
        (at(4086, b"SWAPSPACE2"), Named("a swap space")),
        (at(512, b"EFI PART") || at(4096, b"EFI PART"), Named("a GPT partition table")),
        (at(32_769, b"CD001"), Named("an ISO 9660 file system")),
        (at(510, b"\x55\xaa"), Named("a partition table or boot sector")),
    ];
    known.into_iter().find(|(found, _)| *found).map(|(_, content)| content)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn check(size: u64, bytes: &[(u64, &[u8])], expected: Option<&str>) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        for (offset, bytes) in bytes {
            file.as_file().write_all_at(bytes, *offset).unwrap();
        }
        let found = look(file.path()).unwrap();
        assert_eq!((found.size, found.content.map(Content::name)), (size, expected));
    }

    #[test]
    fn what_both_ends_say_is_believed() {
        let mib = 1 << 20;
        check(0, &[], None);
        check(512, &[], None);
        check(4 * mib, &[], None);
        check(4 * mib, &[(0, b"x")], Some("some data"));
        check(4 * mib, &[(4 * mib - 1, b"x")], Some("some data"));
        check(mib / 2, &[(mib / 2 - 1, b"x")], Some("some data"));
        check(4 * mib, &[(0, b"XFSB")], Some("an xfs file system"));
        check(4 * mib, &[(65_600, b"_BHRfS_M")], Some("a btrfs file system"));
        // A protective partition table comes with a GPT, and a boot sector with many a file system.
        check(4 * mib, &[(510, b"\x55\xaa"), (512, b"EFI PART")], Some("a GPT partition table"));
        check(4 * mib, &[(510, b"\x55\xaa"), (1080, b"\x53\xef")], Some("an ext2/3/4 file system"));
        // Shorter than where its signature would be.
        check(512, &[(510, b"\x55\xaa")], Some("a partition table or boot sector"));
    }
}
