//! What cannot be read: an error for exactly that, until it is written again.

use std::time::Duration;

use crate::area::Area;
use crate::guest::{Guest, guests};
use crate::server::Server;

const LIMIT: Duration = Duration::from_secs(120);

/// The guest's errors, as first and last sector, in order; each has its event.
fn guest_errors(server: &Server) -> Vec<(u64, u64)> {
    let mut errors = Vec::new();
    for event in server.events().iter().filter(|event| event.kind == "guest-error") {
        let sector = event.sector.expect("an error has a place");
        errors.push((sector, sector + event.sectors - 1));
    }
    assert_eq!(u64::try_from(errors.len()).expect("few"), server.status().counters.guest_errors, "{errors:?}");
    errors
}

#[test]
fn an_unreadable_block_is_an_error_for_itself_only_until_it_is_rewritten() {
    let Some(_turn) = guests() else { return };
    let server = Server::start("256M", 1);
    let mut guest = Guest::start(&server, "unreadable.sh", &[], &[], LIMIT);
    let block = Area::parse(&guest.line());
    block.fault(&server, &["--ops", "read", "--until-rewritten"]);
    guest.say("go");

    assert_eq!(guest.line(), "read");
    let status = server.status();
    assert_eq!(status.blocks.pending, 1, "{status:?}");
    assert_eq!((status.blocks.remapped, status.blocks.lost_sectors), (0, 0), "a read error alone takes no slot");
    assert!(status.counters.guest_errors > 0, "{status:?}");
    for (first, last) in guest_errors(&server) {
        assert!(block.contains(first) && block.contains(last), "{first}-{last}");
    }
    guest.say("go");

    guest.finish();
    let healed = server.status();
    assert_eq!((healed.blocks.pending, healed.blocks.remapped), (0, 0), "{healed:?}");
    assert_eq!(healed.counters.guest_errors, status.counters.guest_errors, "{healed:?}");
    assert_eq!(healed.counters.rewritten, 1, "{healed:?}");
}

#[test]
fn a_sector_written_to_an_unreadable_block_loses_exactly_its_unreadable_neighbours() {
    let Some(_turn) = guests() else { return };
    let server = Server::start("256M", 1);
    let mut guest = Guest::start(&server, "lost.sh", &[], &[], LIMIT);
    let (whole, part) = (Area::parse(&guest.line()), Area::parse(&guest.line()));
    let (whole_start, part_start) = (whole.ranges[0].0, part.ranges[0].0);
    let in_part = |numbers: &[u64]| numbers.iter().map(|number| part_start + number).collect::<Vec<_>>();
    for block in [&whole, &part] {
        block.fault(&server, &["--ops", "write"]);
    }
    whole.fault(&server, &["--ops", "read"]);
    for sector in in_part(&[1, 5, 6]) {
        server.fault(&["--ops", "read", "--sectors", &sector.to_string()]);
    }
    guest.say("go");

    assert_eq!(guest.line(), "lost");
    // Sector 2 of the one was written, and sector 5 of the other.
    let in_whole: Vec<u64> = (0..8).filter(|number| *number != 2).map(|number| whole_start + number).collect();
    let lost =
        |server: &Server| server.list().iter().map(|entry| (entry.sector, entry.lost.clone())).collect::<Vec<_>>();
    assert_eq!(lost(&server), [(whole_start, in_whole.clone()), (part_start, in_part(&[1, 6]))]);
    let status = server.status();
    assert_eq!((status.blocks.remapped, status.blocks.lost_sectors), (2, 9), "{status:?}");
    // The guest has read each sector of the two blocks once, and each error names the one that failed.
    let expected: Vec<_> = in_whole.into_iter().chain(in_part(&[1, 6])).map(|sector| (sector, sector)).collect();
    assert_eq!(guest_errors(&server), expected);
    guest.say("go");

    assert_eq!(guest.line(), "rewritten");
    assert_eq!(lost(&server), [(whole_start, vec![]), (part_start, in_part(&[6]))]);
    server.vhost_remap("fault", &["clear"]);
    let errors = server.status().counters.guest_errors;
    guest.say("go");

    guest.finish();
    let status = server.status();
    assert_eq!((status.blocks.lost_sectors, status.blocks.pending), (0, 0), "{status:?}");
    assert_eq!(status.counters.guest_errors, errors, "{status:?}");
    assert_eq!(status.state, ["ok"], "{status:?}");
}
