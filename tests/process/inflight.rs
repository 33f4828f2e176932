//! An in-flight region that a front-end carries along when its guest is migrated, or does not.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use crate::exhaustion::{SLOTS, fill};
use crate::frontend::{
    F_EVENT_IDX, F_LOG_ALL, F_PACKED, LOG_BYTES, NEXT, REGION, Ring, WRITE, guest_memory, region_of,
};
use crate::guest::ANSWER_LIMIT;
use crate::server::{Server, Volume};

const SIZE: u16 = 16;
/// One of the blocks that could only be written if there was another slot.
const HELD: u64 = 1000 + 8 * SLOTS;
const FREE: u64 = 1300;

/// A guest in the middle of its migration, and what its front-end keeps for it.
struct Vm {
    file: Arc<File>,
    ring: Ring,
    inflight: Option<(VhostUserInflight, File)>,
    packed: bool,
    agreed: VhostUserProtocolFeatures,
}

impl Vm {
    fn new(agreed: VhostUserProtocolFeatures, packed: bool) -> Vm {
        let (file, memory) = guest_memory();
        let ring = Ring::new(memory, 0, SIZE, if packed { F_PACKED } else { 0 });
        Vm { file, ring, inflight: None, packed, agreed }
    }

    /// Have the back-end serve the ring where it is, and log what it writes.
    fn connect(&mut self, server: &Server) -> Frontend {
        let stream = UnixStream::connect(&server.socket).unwrap();
        stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
        let mut session = Frontend::from_stream(stream, 1);
        session.set_owner().unwrap();
        let features = session.get_features().unwrap();
        let offered = session.get_protocol_features().unwrap();
        assert!(offered.contains(self.agreed), "{offered:?}");
        session.set_protocol_features(self.agreed).unwrap();
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let refused = F_EVENT_IDX | if self.packed { 0 } else { F_PACKED };
        session.set_features((features & !refused) | F_LOG_ALL).unwrap();
        session.set_mem_table(&[0, REGION, 2 * REGION].map(|start| region_of(&self.file, start))).unwrap();
        let log = memfd_create("dirty-log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&log, LOG_BYTES).unwrap();
        let log_region = VhostUserDirtyLogRegion { mmap_size: LOG_BYTES, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        session.set_log_base(0, Some(log_region)).unwrap();
        if self.inflight.is_none() {
            let wanted = VhostUserInflight { num_queues: 1, queue_size: SIZE, ..Default::default() };
            self.inflight = Some(session.get_inflight_fd(&wanted).unwrap());
        }
        let (inflight, file) = self.inflight.as_ref().unwrap();
        session.set_inflight_fd(inflight, file.as_raw_fd()).unwrap();
        let (kick, call) = self.ring.events();
        session.set_vring_num(0, SIZE).unwrap();
        session.set_vring_addr(0, &self.ring.config(true)).unwrap();
        // Of a packed ring the region knows more than this front-end can say.
        session.set_vring_base(0, if self.packed { 0 } else { self.ring.used_idx() }).unwrap();
        session.set_vring_call(0, &call).unwrap();
        session.set_vring_kick(0, &kick).unwrap();
        session.set_vring_enable(0, true).unwrap();
        session
    }

    /// Offer a write of a block, as descriptors from `head` on.
    fn write(&mut self, head: u16, sector: u64) {
        let at = self.ring.area() + u64::from(head) * 0x2000;
        self.ring.write(at, &[&1_u32.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat());
        self.ring.write(at + 0x1000, &[0x5a; 4096]);
        self.ring.descriptor(head, (at, 16, NEXT, head + 1));
        self.ring.descriptor(head + 1, (at + 0x1000, 4096, NEXT, head + 2));
        self.ring.descriptor(head + 2, (at + 16, 1, WRITE, 0));
        self.ring.offer(head);
    }

    fn status(&self, head: u16) -> u8 {
        self.ring.read(self.ring.area() + u64::from(head) * 0x2000 + 16, 1)[0]
    }
}

/// A guest whose ring was stopped during its migration, with a write held since before its last request.
fn stopped(server: &Server, agreed: VhostUserProtocolFeatures, packed: bool) -> Vm {
    drop(fill(server));
    let always = VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::LOG_SHMFD;
    let mut vm = Vm::new(always | agreed, packed);
    let session = vm.connect(server);
    vm.write(0, HELD);
    server.await_status(|status| status.messages.iter().any(|message| message.contains("wait (1 do)")));
    vm.write(3, FREE);
    assert_eq!((vm.ring.take(ANSWER_LIMIT), vm.status(3)), (Some((3, 1)), 0));
    let base = session.get_vring_base(0).unwrap();
    // Two chains were taken, of three descriptors each.
    assert_eq!(if packed { base & 0xffff } else { base }, if packed { 0x8006 } else { 2 });
    vm
}

#[test]
fn a_stop_leaves_what_is_held_in_a_region_that_goes_along() {
    [false, true].into_iter().for_each(check_region_goes_along);
}

fn check_region_goes_along(packed: bool) {
    let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
    let server = volume.serve(&["--on-spare-full", "hold"]);
    let mut vm = stopped(&server, VhostUserProtocolFeatures::GET_VRING_BASE_INFLIGHT, packed);
    assert_eq!((vm.ring.used_idx(), vm.status(0)), (if packed { 0x8003 } else { 1 }, 0xff));
    // Wherever the guest goes on: with a server that knows nothing of it.
    server.stop();
    let server = volume.serve(&[]);
    let session = vm.connect(&server);
    assert_eq!((vm.ring.take(ANSWER_LIMIT), vm.status(0)), (Some((0, 1)), 0));
    vm.write(3, FREE);
    assert_eq!((vm.ring.take(ANSWER_LIMIT), vm.status(3)), (Some((3, 1)), 0));
    drop(session);
    assert_eq!(server.guest(1).read(HELD, 8), Ok(vec![0x5a; 4096]));
}

/// Else nobody would ever answer it.
#[test]
fn a_stop_answers_what_is_held_if_the_region_does_not_go_along() {
    [false, true].into_iter().for_each(check_region_stays);
}

fn check_region_stays(packed: bool) {
    let volume = Volume::create(32, u32::try_from(SLOTS).unwrap());
    let server = volume.serve(&["--on-spare-full", "hold"]);
    let mut vm = stopped(&server, VhostUserProtocolFeatures::empty(), packed);
    let used = if packed { 0x8006 } else { 2 };
    assert_eq!((vm.ring.used_idx(), vm.ring.take(ANSWER_LIMIT), vm.status(0)), (used, Some((0, 1)), 1));
}
