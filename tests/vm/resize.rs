//! A disk that grows under a guest: the kernel there hears of it, and its file system takes it.

use std::time::Duration;

use crate::guest::{Guest, guests};
use crate::server::Server;

#[test]
fn a_guest_sees_its_disk_grow_also_after_the_server_was_killed() {
    let Some(_turn) = guests() else { return };
    let mut server = Server::start("128M", 2);
    let mut guest = Guest::start(&server, "resize.sh", &[], &[], Duration::from_secs(120));
    assert_eq!(guest.line(), (128_u64 << 20).to_string());
    server.vhost_remap("resize", &["--size", "192M"]);
    guest.say(&(192_u64 << 20).to_string());
    assert_eq!(guest.line(), "grown");
    // Nobody is connected, or hardly: the front-end hears of it once it is.
    server.kill();
    server.run();
    server.vhost_remap("resize", &["--size", "256M"]);
    guest.say(&(256_u64 << 20).to_string());
    assert_eq!(guest.line(), "grown");
    guest.finish();
    server.assert_unnoticed();
}
