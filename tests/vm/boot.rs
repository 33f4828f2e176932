//! A guest that starts from the disk itself: the firmware's reads, the boot loader's and the kernel's.

use std::time::Duration;

use crate::area::Area;
use crate::guest::{Guest, debian_disk, guests, has_uefi};
use crate::server::Server;

/// Without KVM it takes about ten seconds, and twice that with UEFI.
const LIMIT: Duration = Duration::from_secs(120);
/// Where the image has its boot loader: see `vm-images/debian/recipe`.
const LOADER: [&str; 2] = ["0-7", "2048-2175"];
/// Partition table and EFI system partition, all of it.
const UEFI: [&str; 2] = ["0-39", "4096-12287"];

fn boot(server: &Server, time: &str, firmware: &str) -> Guest {
    Guest::start(server, "boot.sh", &[time], &["--image", "debian", "--firmware", firmware], LIMIT)
}

#[test]
fn a_guest_boots_from_its_disk_and_its_root_file_system_does_not_notice_bad_blocks() {
    let Some(_turn) = guests() else { return };
    let Some(image) = debian_disk() else { return };
    let mut server = Server::adopt(&image, 1);
    let mut guest = boot(&server, "first", "bios");
    let kernel = Area::parse(&guest.line());
    let areas: Vec<Area> = (0..3).map(|_| Area::parse(&guest.line())).collect();
    for area in &areas {
        area.fault(&server, &["--ops", "write"]);
    }
    guest.say("go");
    guest.finish();
    server.assert_unnoticed();
    let remapped = server.remapped();
    for area in &areas {
        assert!(remapped.iter().any(|sector| area.contains(*sector)), "nothing was remapped in the {}", area.name);
    }

    // What a boot reads first lives in slots now, and cannot be read from where it was.
    let (start, _) = kernel.ranges[0];
    let kernel = format!("{start}-{}", start + 64 * 8 - 1);
    let moved = [&LOADER[..], &[&kernel]].concat();
    server.vhost_remap("remap", &moved);
    let remapped = server.remapped();
    server.stop();
    server.run();
    assert_eq!(server.remapped(), remapped);
    for sectors in moved {
        server.fault(&["--ops", "read", "--sectors", sectors]);
    }
    for area in &areas {
        area.fault(&server, &["--ops", "write"]);
    }
    boot(&server, "second", "bios").finish();
    server.assert_unnoticed();
}

/// OVMF has a driver of its own, which does less than SeaBIOS' or a kernel's, and writes to the system partition.
#[test]
fn a_guest_boots_by_uefi_from_blocks_that_have_moved() {
    let Some(_turn) = guests() else { return };
    if !has_uefi() {
        return;
    }
    let Some(image) = debian_disk() else { return };
    let server = Server::adopt(&image, 1);
    server.vhost_remap("remap", &UEFI);
    for sectors in UEFI {
        server.fault(&["--ops", "read,write", "--sectors", sectors]);
    }
    boot(&server, "uefi", "uefi").finish();
    server.assert_unnoticed();
    let status = server.status();
    assert!(status.counters.writes > 0 && status.counters.device_errors == 0, "{status:?}");
}
