//! A connection to a backend: the protocol by the `vhost` crate's front-end half, and queues in one memory.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{FileOffset, MmapRegion};

use crate::ring::{self, Ring};

/// Longest wait for an answer of the protocol.
const PROTOCOL_LIMIT: Duration = Duration::from_secs(30);

/// The front-end's own addresses are not those of the guest.
const USER: u64 = 0x5500_0000_0000;

/// What a plain driver takes, of the same bits from every backend: FLUSH, MQ, INDIRECT, EVENT_IDX, protocol
/// features, VERSION_1.
const FEATURES: u64 = 1 << 9 | 1 << 12 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;
const NEEDED: u64 = FEATURES & !(1 << 12);

/// The connection, which ends with this.
pub(crate) struct Session(#[expect(dead_code, reason = "held for its socket")] Frontend);

/// Connect, and set up queues for requests of so many bytes, so many at a time.
///
/// # Errors
/// When the backend refuses something, or lacks what the measurement needs.
pub(crate) fn connect(
    socket: &Path,
    queues: usize,
    depth: usize,
    data_len: usize,
    indirect: bool,
) -> Result<(Session, Vec<Ring>), String> {
    let (file, memory) = memory(queues * ring::memory_len(depth, data_len));
    let rings: Vec<Ring> = (0..queues)
        .map(|queue| Ring::new(memory.clone(), queue * ring::memory_len(depth, data_len), depth, data_len, indirect))
        .collect();
    let stream = UnixStream::connect(socket).map_err(|error| format!("{}: {error}", socket.display()))?;
    stream.set_read_timeout(Some(PROTOCOL_LIMIT)).map_err(|error| error.to_string())?;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: memory.size() as u64,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    let session = start(stream, &rings, &region)?;
    Ok((session, rings))
}

fn start(stream: UnixStream, rings: &[Ring], region: &VhostUserMemoryRegionInfo) -> Result<Session, String> {
    let mut session = Frontend::from_stream(stream, rings.len() as u64);
    let features = session.set_owner().and_then(|()| session.get_features());
    let features = features.map_err(|error| format!("vhost-user: {error}"))?;
    if features & NEEDED != NEEDED {
        return Err(format!("the backend offers features {features:x}, and {NEEDED:x} are needed"));
    }
    set_up(&mut session, features, rings, region).map_err(|error| format!("vhost-user: {error}"))?;
    Ok(Session(session))
}

fn set_up(
    session: &mut Frontend,
    features: u64,
    rings: &[Ring],
    region: &VhostUserMemoryRegionInfo,
) -> Result<(), vhost::Error> {
    session.set_features(features & FEATURES)?;
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let offered = session.get_protocol_features()?;
    session.set_protocol_features(offered & wanted)?;
    if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    // The crate refuses queues beyond this.
    session.get_queue_num()?;
    session.set_mem_table(std::slice::from_ref(region))?;
    for (queue, ring) in rings.iter().enumerate() {
        let config = ring.config(USER);
        session.set_vring_num(queue, config.queue_size)?;
        session.set_vring_addr(queue, &config)?;
        session.set_vring_base(queue, 0)?;
        session.set_vring_call(queue, &ring.call)?;
        session.set_vring_kick(queue, &ring.kick)?;
        session.set_vring_enable(queue, true)?;
    }
    Ok(())
}

fn memory(len: usize) -> (File, Arc<MmapRegion>) {
    let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(len as u64).expect("memory");
    let again = file.try_clone().expect("a descriptor");
    let memory = MmapRegion::from_file(FileOffset::new(again, 0), len).expect("a mapping");
    (file, Arc::new(memory))
}
