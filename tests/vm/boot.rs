//! A guest that starts from the disk itself: the firmware's reads, the boot loader's and the kernel's.

use std::time::Duration;

use crate::area::Area;
use crate::guest::{Guest, debian_disk, guests};
use crate::server::Server;

/// Without KVM it takes about ten seconds.
const LIMIT: Duration = Duration::from_secs(120);
/// Where the image has its boot loader: see `vm-images/debian/recipe`.
const LOADER: [&str; 2] = ["0-7", "2048-2175"];

fn boot(server: &Server, time: &str) -> Guest {
    Guest::start(server, "boot.sh", &[time], &["--image", "debian"], LIMIT)
}

#[test]
fn a_guest_boots_from_its_disk_and_its_root_file_system_does_not_notice_bad_blocks() {
    let Some(_turn) = guests() else { return };
    let Some(image) = debian_disk() else { return };
    let mut server = Server::adopt(&image, 1);
    let mut guest = boot(&server, "first");
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
    boot(&server, "second").finish();
    server.assert_unnoticed();
}
