//! The table of front-ends: what each says, as their sources have it, to a back-end that offers what this one does.

use crate::frontend::{F_EVENT_IDX, F_INDIRECT, F_PACKED};
use crate::traces::Step;
use crate::traces_messages::{
    ADD_MEM_REG, Answer, Body, F_FLUSH, Fd, GET_CONFIG, GET_FEATURES, GET_INFLIGHT_FD, GET_MAX_MEM_SLOTS,
    GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE, Index, Message, NEED_REPLY, OFFERED, PLAIN, PROTOCOL_OFFERED,
    REM_MEM_REG, RESET_DEVICE, SET_BACKEND_REQ_FD, SET_CONFIG, SET_FEATURES, SET_INFLIGHT_FD, SET_MEM_TABLE, SET_OWNER,
    SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR,
    SET_VRING_KICK, SET_VRING_NUM,
};

/// A front-end and its guest.
pub(crate) struct Trace {
    pub(crate) name: &'static str,
    /// Rings the guest uses, and entries of each.
    pub(crate) rings: usize,
    pub(crate) size: u16,
    /// What the guest takes of the features.
    pub(crate) features: u64,
    /// Guest address, front-end address and length of each region.
    pub(crate) memory: &'static [(u64, u64, u64)],
    pub(crate) steps: Vec<Step>,
}

/// Low and high memory and some that can be unplugged, at addresses as a process has them.
const PC: &[(u64, u64, u64)] = &[
    (0, 0x7f10_0000_0000, 0x40_0000),
    (0x40_0000, 0x7f20_0000_0000, 0x60_0000),
    (0xa0_0000, 0x7f30_0000_0000, 0x20_0000),
];
/// Wherever a program has its buffers: no two numbers for the same place, and no page boundary in between.
const BUFFERS: &[(u64, u64, u64)] = &[(0, 0, 0x40_0123), (0x40_0123, 0x40_0123, 0x80_0000 - 0x123)];

/// Virtio-blk's own, and VERSION_1, which is 1 << 32.
const BLK: u64 = 0x7e46 | 1 << 32;
const F_PROTOCOL: u64 = 1 << 30;

fn message(request: u32, body: Body) -> Message {
    Message { request, flags: PLAIN, body, fds: Vec::new(), answer: Answer::None }
}

fn tell(request: u32, body: Body) -> Step {
    Step::Say(message(request, body))
}

fn tell_with(request: u32, body: Body, fds: Vec<Fd>) -> Step {
    Step::Say(Message { fds, ..message(request, body) })
}

fn ask(request: u32, body: Body, answer: Answer) -> Step {
    Step::Say(Message { answer, ..message(request, body) })
}

/// A front-end that wants to be told of everything. Questions have their answers anyway.
fn needing_replies(steps: Vec<Step>) -> Vec<Step> {
    let need = |step| match step {
        Step::Say(message) => {
            let answer = if message.answer == Answer::None { Answer::Ack } else { message.answer };
            Step::Say(Message { flags: NEED_REPLY, answer, ..message })
        }
        other => other,
    };
    steps.into_iter().map(need).collect()
}

fn call(ring: u32) -> Step {
    tell_with(SET_VRING_CALL, Body::Word(ring.into()), vec![Fd::Call(ring)])
}

fn kick(ring: u32) -> Step {
    tell_with(SET_VRING_KICK, Body::Word(ring.into()), vec![Fd::Kick(ring)])
}

fn enable(rings: u32, enabled: u32) -> Vec<Step> {
    (0..rings).map(|ring| tell(SET_VRING_ENABLE, Body::State(ring, enabled))).collect()
}

fn base(ring: u32) -> Step {
    ask(GET_VRING_BASE, Body::State(ring, 0), Answer::Base)
}

fn table(regions: usize) -> Step {
    tell_with(SET_MEM_TABLE, Body::Table, vec![Fd::Memory; regions])
}

/// hw/block/vhost-user-blk.c and hw/virtio/{vhost,vhost-user}.c, with `num-queues=4` of which the guest uses some.
/// Release 10 waits until descriptors have arrived, 7.2 does not; the latter resets no device.
#[derive(Clone, Copy)]
struct Qemu {
    release: u32,
    rings: u32,
    size: u16,
    features: u64,
}

impl Qemu {
    const QUEUES: u32 = 4;

    fn files(self, steps: Vec<Step>) -> Vec<Step> {
        if self.release >= 10 { needing_replies(steps) } else { steps }
    }

    /// vhost_user_blk_connect.
    fn connect(self) -> Vec<Step> {
        let calls = (0..Self::QUEUES).flat_map(|ring| {
            self.files(vec![call(ring), tell_with(SET_VRING_ERR, Body::Word(ring.into()), vec![Fd::Err])])
        });
        let mut steps = vec![
            ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
            ask(GET_PROTOCOL_FEATURES, Body::Empty, Answer::Word(PROTOCOL_OFFERED)),
            // Up to 10 it knows no more than twenty of them, and later ones take GET_VRING_BASE_INFLIGHT if told to.
            tell(SET_PROTOCOL_FEATURES, Body::Word(PROTOCOL_OFFERED & 0xf_ffff)),
            ask(GET_QUEUE_NUM, Body::Empty, Answer::Word(64)),
            ask(GET_MAX_MEM_SLOTS, Body::Empty, Answer::Word(509)),
        ];
        steps.extend(needing_replies(vec![tell_with(SET_BACKEND_REQ_FD, Body::Empty, vec![Fd::Channel])]));
        steps.extend([tell(SET_OWNER, Body::Empty), ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED))]);
        steps.extend(calls);
        steps
    }

    /// vhost_user_blk_realize_connect, once connected.
    fn realize(self) -> Vec<Step> {
        let mut steps = self.connect();
        steps.push(ask(GET_CONFIG, Body::Config(0, 57, 0), Answer::Config));
        steps
    }

    /// vhost_user_blk_start; `fresh` where no in-flight region is kept, `told` where the memory is known already.
    fn start(self, fresh: bool, told: bool) -> Vec<Step> {
        let features = tell(SET_FEATURES, Body::Word(self.features | F_PROTOCOL));
        let mut steps = vec![features.clone()];
        if fresh {
            let queues = u16::try_from(Self::QUEUES).expect("a few");
            steps.push(ask(GET_INFLIGHT_FD, Body::Inflight(queues, self.size), Answer::Inflight));
        }
        steps.push(tell_with(SET_INFLIGHT_FD, Body::InflightBack, vec![Fd::Inflight]));
        steps.push(features);
        if !told {
            let add = (0..PC.len()).map(|index| tell_with(ADD_MEM_REG, Body::Region(index), vec![Fd::Memory]));
            steps.extend(needing_replies(add.collect()));
        }
        for ring in 0..self.rings {
            steps.push(tell(SET_VRING_NUM, Body::State(ring, self.size.into())));
            steps.push(tell(SET_VRING_BASE, Body::Base(ring, Index::Used)));
            steps.push(tell(SET_VRING_ADDR, Body::Ring(ring)));
            steps.extend(self.files(vec![kick(ring)]));
        }
        steps.extend(needing_replies(enable(Self::QUEUES, 1)));
        steps.extend(self.files((0..Self::QUEUES).map(call).collect()));
        steps
    }

    /// vhost_user_blk_stop.
    fn stop(self) -> Vec<Step> {
        let mut steps = needing_replies(enable(Self::QUEUES, 0));
        steps.extend((0..self.rings).map(base));
        steps
    }

    /// virtio_reset: of the guest's own, and where it starts anew.
    fn reset(self) -> Vec<Step> {
        let mut steps = self.stop();
        if self.release >= 10 {
            steps.push(tell(RESET_DEVICE, Body::Empty));
        }
        steps.push(Step::Driver);
        steps.extend(self.start(true, true));
        steps
    }

    /// The same by a front-end that keeps the in-flight region. A reset that the back-end does not hear of is none.
    fn reset_with_region(self) -> Vec<Step> {
        if self.release < 10 {
            return Vec::new();
        }
        let reset = vec![tell(RESET_DEVICE, Body::Empty), Step::Driver];
        [self.stop(), reset, self.start(false, true)].concat()
    }

    /// The connection or the server goes while a request is held, which the next session takes from the region.
    fn reconnect(self, goes: &[Step]) -> Vec<Step> {
        let io = vec![Step::Held(0), Step::Io(0)];
        [vec![Step::Hold(0)], goes.to_vec(), self.connect(), self.start(false, false), io].concat()
    }
}

fn qemu_7_2() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let qemu = Qemu { release: 7, rings: 2, size: 128, features };
    let io = vec![Step::Io(0), Step::Io(1)];
    let steps = [
        qemu.realize(),
        qemu.start(true, false),
        io.clone(),
        // The machine is stopped and goes on.
        qemu.stop(),
        qemu.start(false, true),
        io.clone(),
        qemu.reset(),
        io.clone(),
        qemu.reconnect(&[Step::HangUp, Step::Return]),
        qemu.reconnect(&[Step::Crash]),
        io,
        qemu.stop(),
        vec![Step::HangUp],
    ];
    Trace { name: "QEMU 7.2", rings: 2, size: 128, features, memory: PC, steps: steps.concat() }
}

/// `packed=on`. After a kill of the server QEMU says of a packed ring what it knew before.
fn qemu_packed(release: u32, name: &'static str) -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT | F_PACKED;
    // Chains of three descriptors and one begin everywhere in such a ring.
    let qemu = Qemu { release, rings: 2, size: 16, features };
    let io = vec![Step::Io(0), Step::Io(1), Step::Long(0, 40), Step::Io(0)];
    let steps = [
        qemu.realize(),
        qemu.start(true, false),
        io.clone(),
        qemu.stop(),
        qemu.start(false, true),
        io.clone(),
        qemu.reconnect(&[Step::HangUp, Step::Return]),
        io.clone(),
        qemu.reconnect(&[Step::Crash]),
        io.clone(),
        qemu.reset(),
        io.clone(),
        qemu.reset_with_region(),
        io.clone(),
        qemu.reconnect(&[Step::Crash]),
        io,
        qemu.stop(),
        vec![Step::HangUp],
    ];
    Trace { name, rings: 2, size: 16, features, memory: PC, steps: steps.concat() }
}

fn qemu_10() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let qemu = Qemu { release: 10, rings: 2, size: 256, features };
    let io = vec![Step::Io(0), Step::Io(1)];
    let writeback = |value| needing_replies(vec![tell(SET_CONFIG, Body::Writeback(value, 0))]);
    let last = PC.len() - 1;
    let unplugged = needing_replies(vec![
        tell(REM_MEM_REG, Body::Region(last)),
        tell_with(ADD_MEM_REG, Body::Region(last), vec![Fd::Memory]),
    ]);
    let steps = [
        qemu.realize(),
        qemu.start(true, false),
        io.clone(),
        writeback(0),
        io.clone(),
        writeback(1),
        unplugged,
        io.clone(),
        qemu.reset(),
        io.clone(),
        // Masked and unmasked by the guest's interrupt controller.
        qemu.files(vec![call(0), call(1)]),
        io.clone(),
        qemu.reconnect(&[Step::HangUp, Step::Return]),
        qemu.reconnect(&[Step::Crash]),
        io,
        qemu.stop(),
        vec![Step::HangUp],
    ];
    Trace { name: "QEMU 10", rings: 2, size: 256, features, memory: PC, steps: steps.concat() }
}

/// A guest whose driver makes the cache write-through, and so never flushes; up to the reconnection after a crash.
pub(crate) fn qemu_in_write_through() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let qemu = Qemu { release: 10, rings: 1, size: 128, features };
    let steps = [
        qemu.realize(),
        qemu.start(true, false),
        vec![Step::Io(0)],
        needing_replies(vec![tell(SET_CONFIG, Body::Writeback(0, 0))]),
        // Its successor is shown what the front-end remembers.
        qemu.reset(),
        vec![Step::Io(0), Step::Crash],
        qemu.connect(),
        qemu.start(false, false),
    ];
    Trace { name: "QEMU, write-through", rings: 1, size: 128, features, memory: PC, steps: steps.concat() }
}

/// A guest with viostor in QEMU: chains of up to 512 buffers, and a reset when a request has been stuck for a minute.
fn windows() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let qemu = Qemu { release: 10, rings: 1, size: 128, features };
    let io = vec![Step::Io(0), Step::Long(0, 512), Step::Long(0, 129)];
    let steps = [
        qemu.realize(),
        qemu.start(true, false),
        io.clone(),
        vec![Step::Io(0), Step::Hold(0)],
        qemu.reset(),
        vec![Step::Return, Step::Dropped(0)],
        io,
        qemu.reset(),
        vec![Step::Io(0)],
        qemu.stop(),
        vec![Step::HangUp],
    ];
    Trace { name: "Windows", rings: 1, size: 128, features, memory: PC, steps: steps.concat() }
}

/// virtio-devices/src/vhost_user/{blk,vu_common_ctrl}.rs: set_protocol_features_vhost_user asks for nothing a second
/// time, and goes on where the guest has got to.
fn cloud_hypervisor() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let (rings, size) = (2, 128);
    let protocol = PROTOCOL_OFFERED & 0x920b;
    let greeting = vec![
        tell(SET_OWNER, Body::Empty),
        ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
        ask(GET_PROTOCOL_FEATURES, Body::Empty, Answer::Word(PROTOCOL_OFFERED)),
        tell(SET_PROTOCOL_FEATURES, Body::Word(protocol)),
    ];
    let again = vec![
        tell(SET_OWNER, Body::Empty),
        ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
        tell(SET_PROTOCOL_FEATURES, Body::Word(protocol)),
    ];
    let questions = needing_replies(vec![
        ask(GET_QUEUE_NUM, Body::Empty, Answer::Word(64)),
        ask(GET_CONFIG, Body::Config(0, 60, 1), Answer::Config),
    ]);
    let set_up = |fresh: bool| {
        let mut steps = vec![tell(SET_FEATURES, Body::Word(features | F_PROTOCOL)), table(PC.len())];
        steps.extend((0..rings).map(|ring| tell(SET_VRING_NUM, Body::State(ring, size.into()))));
        if fresh {
            let asked = Body::Inflight(u16::try_from(rings).expect("a few"), size);
            steps.push(ask(GET_INFLIGHT_FD, asked, Answer::Inflight));
        }
        steps.push(tell_with(SET_INFLIGHT_FD, Body::InflightBack, vec![Fd::Inflight]));
        for ring in 0..rings {
            steps.push(tell(SET_VRING_ADDR, Body::Ring(ring)));
            steps.push(tell(SET_VRING_BASE, Body::Base(ring, Index::Avail)));
            steps.extend([call(ring), kick(ring)]);
        }
        steps.extend(enable(rings, 1));
        needing_replies(steps)
    };
    let enable = |enabled| needing_replies(enable(rings, enabled));
    let io = vec![Step::Io(0), Step::Io(1)];
    let writeback =
        needing_replies(vec![tell(SET_CONFIG, Body::Writeback(0, 1)), tell(SET_CONFIG, Body::Writeback(1, 1))]);
    let reconnect = |goes: &[Step]| {
        [vec![Step::Hold(0)], goes.to_vec(), again.clone(), set_up(false), vec![Step::Held(0), Step::Io(0)]].concat()
    };
    let steps = [
        greeting,
        questions,
        set_up(true),
        io.clone(),
        writeback,
        enable(0),
        enable(1),
        io.clone(),
        reconnect(&[Step::Crash]),
        reconnect(&[Step::HangUp, Step::Return]),
        io,
        enable(1),
        vec![Step::HangUp],
    ];
    Trace { name: "cloud-hypervisor", rings: 2, size, features, memory: PC, steps: steps.concat() }
}

/// devices/src/virtio/vhost_user_frontend/mod.rs: asks for no answer it need not have, reads what the guest reads.
fn crosvm() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let (rings, size) = (2, 32768);
    let read = |offset, len| ask(GET_CONFIG, Body::Config(offset, len, 1), Answer::Config);
    let activate = || {
        let mut steps = vec![table(PC.len())];
        for ring in 0..rings {
            steps.push(tell(SET_VRING_NUM, Body::State(ring, size.into())));
            steps.push(tell(SET_VRING_ADDR, Body::Ring(ring)));
            steps.push(tell(SET_VRING_BASE, Body::Base(ring, Index::Used)));
            steps.extend([call(ring), kick(ring)]);
            steps.push(tell(SET_VRING_ENABLE, Body::State(ring, 1)));
        }
        steps
    };
    let deactivate = || -> Vec<Step> {
        (0..rings).flat_map(|ring| [tell(SET_VRING_ENABLE, Body::State(ring, 0)), base(ring)]).collect()
    };
    let set_features = vec![tell(SET_FEATURES, Body::Word(features | F_PROTOCOL))];
    let io = vec![Step::Io(0), Step::Io(1)];
    let steps = [
        vec![
            tell(SET_OWNER, Body::Empty),
            ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
            ask(GET_PROTOCOL_FEATURES, Body::Empty, Answer::Word(PROTOCOL_OFFERED)),
            tell(SET_PROTOCOL_FEATURES, Body::Word(PROTOCOL_OFFERED & 0x209)),
            ask(GET_QUEUE_NUM, Body::Empty, Answer::Word(64)),
        ],
        vec![read(0, 8), read(0, 4), read(4, 4), read(20, 4), read(24, 1), read(25, 3), read(34, 2), read(60, 40)],
        set_features.clone(),
        activate(),
        io.clone(),
        vec![read(8, 4), read(95, 1), read(4000, 8)],
        // Asleep and awake.
        deactivate(),
        activate(),
        io.clone(),
        vec![tell(SET_CONFIG, Body::Writeback(1, 0))],
        // Reset by the guest.
        deactivate(),
        vec![Step::Driver],
        set_features,
        activate(),
        io,
        deactivate(),
        vec![Step::HangUp],
    ];
    Trace { name: "crosvm", rings: 2, size, features, memory: PC, steps: steps.concat() }
}

/// src/vmm/src/devices/virtio/{vhost_user,block/vhost_user/device}.rs, with `cache_type: Writeback`.
fn firecracker() -> Trace {
    let features = 1 << 32 | F_EVENT_IDX | F_FLUSH;
    let read = || ask(GET_CONFIG, Body::Config(0, 60, 1), Answer::Config);
    let steps = vec![
        tell(SET_OWNER, Body::Empty),
        ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
        ask(GET_PROTOCOL_FEATURES, Body::Empty, Answer::Word(PROTOCOL_OFFERED)),
        tell(SET_PROTOCOL_FEATURES, Body::Word(PROTOCOL_OFFERED & 0x200)),
        read(),
        tell(SET_FEATURES, Body::Word(features | F_PROTOCOL)),
        table(PC.len()),
        tell(SET_VRING_NUM, Body::State(0, 256)),
        tell(SET_VRING_ADDR, Body::Ring(0)),
        tell(SET_VRING_BASE, Body::Base(0, Index::Avail)),
        call(0),
        kick(0),
        tell(SET_VRING_ENABLE, Body::State(0, 1)),
        Step::Io(0),
        // PATCH /drives.
        read(),
        Step::Io(0),
        Step::HangUp,
    ];
    Trace { name: "Firecracker", rings: 1, size: 256, features, memory: PC, steps }
}

/// virtio-driver's src/transports/vhost_user.rs: features of the device before those of the protocol.
fn libblkio() -> Trace {
    let features = BLK | F_EVENT_IDX | F_INDIRECT;
    let mut acked = vec![
        ask(GET_QUEUE_NUM, Body::Empty, Answer::Word(64)),
        ask(GET_MAX_MEM_SLOTS, Body::Empty, Answer::Word(509)),
        ask(GET_CONFIG, Body::Config(0, 60, 0), Answer::Config),
    ];
    acked.extend((0..BUFFERS.len()).map(|index| tell_with(ADD_MEM_REG, Body::Region(index), vec![Fd::Memory])));
    for ring in 0..2 {
        acked.push(tell(SET_VRING_NUM, Body::State(ring, 128)));
        acked.push(tell(SET_VRING_BASE, Body::State(ring, 0)));
        acked.push(tell(SET_VRING_ADDR, Body::Ring(ring)));
        acked.extend([kick(ring), call(ring), tell(SET_VRING_ENABLE, Body::State(ring, 1))]);
    }
    acked.extend([Step::Io(0), Step::Io(1)]);
    acked.extend((0..BUFFERS.len()).map(|index| tell_with(REM_MEM_REG, Body::Region(index), vec![Fd::Memory])));
    let greeting = vec![
        tell(SET_OWNER, Body::Empty),
        ask(GET_FEATURES, Body::Empty, Answer::Word(OFFERED)),
        tell(SET_FEATURES, Body::Word(features | F_PROTOCOL)),
        ask(GET_PROTOCOL_FEATURES, Body::Empty, Answer::Word(PROTOCOL_OFFERED)),
        tell(SET_PROTOCOL_FEATURES, Body::Word(PROTOCOL_OFFERED & 0x8209)),
    ];
    let steps = [greeting, needing_replies(acked), vec![Step::HangUp]].concat();
    Trace { name: "libblkio", rings: 2, size: 128, features, memory: BUFFERS, steps }
}

pub(crate) fn traces() -> Vec<Trace> {
    let packed = [qemu_packed(7, "QEMU 7.2, packed"), qemu_packed(10, "QEMU 10, packed")];
    let others = [qemu_7_2(), qemu_10(), windows(), cloud_hypervisor(), crosvm(), firecracker(), libblkio()];
    packed.into_iter().chain(others).collect()
}
