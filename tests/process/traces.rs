//! Front-ends as they talk: each message sent byte for byte, with the answer it must get, and the requests of a guest
//! in between.
//!
//! `traces_messages` has the messages, `traces_frontends` the table of front-ends, and `traces_hostile` shows what
//! becomes of it when one of them is not as it should be.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::frontend::{F_INDIRECT, F_PACKED, INDIRECT, NEXT, Raw, Ring, WRITE, guest_memory};
use crate::guest::ANSWER_LIMIT;
use crate::model::pattern;
use crate::server::{Server, Volume, done, vhost_remap};
use crate::traces_frontends::{Trace, qemu_in_write_through, traces};
use crate::traces_messages::{
    Answer, Body, F_FLUSH, Fd, GET_CONFIG, Index, Message, PLAIN, PROTOCOL_OFFERED, Received, SET_PROTOCOL_FEATURES,
    connect, framed, halves, receive, words,
};

const SERIAL: &str = "traced-disk";
/// Sectors of the volume.
const CAPACITY: u64 = 32 << 11;
/// What is written on ring `n` goes to the sectors from here on, `n` times [`SPAN`] further.
const SECTOR: u64 = 1000;
const SPAN: u64 = 4096;
const COUNT: u64 = 8;

/// Where a packed ring begins: at its first descriptor, with both wrap counters set.
const PACKED_START: u32 = 0x8000_8000;

/// What happens next.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Say(Message),
    /// On a ring: a write, a read of it, a flush if that was negotiated, and the serial number.
    Io(usize),
    /// A write and a read, each in one chain of an indirect table with so many buffers, more than the ring has entries.
    Long(usize, u16),
    /// The primary is gone, and a write on a ring waits for it.
    Hold(usize),
    /// The primary is back.
    Return,
    /// That write has been done, once.
    Held(usize),
    /// It has not been done, and never will be.
    Dropped(usize),
    /// The guest's driver starts anew, with empty rings.
    Driver,
    /// The front-end closes its connection without a word, and the next message goes over a new one.
    HangUp,
    /// The server is killed, and the next message goes to its successor.
    Crash,
}

/// A guest: its memory and what is in it, which outlives connections.
pub(crate) struct Vm<'a> {
    trace: &'a Trace,
    file: Arc<File>,
    /// Keeps the mappings that the rings use.
    _memory: Arc<GuestMemoryMmap>,
    pub(crate) rings: Vec<Ring>,
    err: EventFd,
    /// The end that the device gets, and ours.
    channel: (UnixStream, UnixStream),
    inflight: Option<(Vec<u8>, File)>,
    /// Where each ring went on when it was last stopped, as QEMU says it of packed ones.
    bases: Vec<u32>,
    /// What was last written on each ring.
    stamps: Vec<u64>,
    next_stamp: u64,
    reference: Vec<u8>,
}

impl Vm<'_> {
    pub(crate) fn new<'a>(trace: &'a Trace, reference: &[u8]) -> Vm<'a> {
        let (file, memory) = guest_memory();
        let ring = |index| Ring::new(memory.clone(), index, trace.size, trace.features);
        let mut rings: Vec<_> = (0..trace.rings).map(ring).collect();
        rings.iter_mut().for_each(|ring| ring.restart_at(0));
        let stamps = vec![0; trace.rings];
        let err = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let channel = UnixStream::pair().expect("sockets");
        let reference = reference.to_vec();
        let bases = vec![PACKED_START; trace.rings];
        Vm {
            trace,
            file,
            _memory: memory,
            rings,
            err,
            channel,
            inflight: None,
            bases,
            stamps,
            next_stamp: 1,
            reference,
        }
    }

    fn is_packed(&self) -> bool {
        self.trace.features & F_PACKED != 0
    }

    fn ring(&self, index: u32) -> &Ring {
        &self.rings[usize::try_from(index).expect("small")]
    }

    fn region(&self, index: usize) -> Vec<u8> {
        let (guest, user, len) = self.trace.memory[index];
        words(&[guest, len, user, guest])
    }

    fn user(&self, guest: u64) -> u64 {
        let holds = |(start, _, len): &&(u64, u64, u64)| (*start..start + len).contains(&guest);
        let (start, user, _) = self.trace.memory.iter().find(holds).expect("rings are in memory");
        user + (guest - start)
    }

    /// The payload of a message as it is now.
    pub(crate) fn payload(&self, body: &Body) -> Vec<u8> {
        match *body {
            Body::Empty => Vec::new(),
            Body::Word(word) => words(&[word]),
            Body::State(ring, number) => halves(&[ring, number]),
            Body::Base(ring, _) if self.is_packed() => {
                halves(&[ring, self.bases[usize::try_from(ring).expect("small")]])
            }
            Body::Base(ring, Index::Used) => halves(&[ring, self.ring(ring).used_idx().into()]),
            Body::Base(ring, Index::Avail) => halves(&[ring, self.ring(ring).avail_idx().into()]),
            Body::Ring(ring) => {
                let [descriptors, used, avail] = self.ring(ring).parts().map(|part| self.user(part));
                [halves(&[ring, 0]), words(&[descriptors, used, avail, 0])].concat()
            }
            Body::Table => {
                let count = u32::try_from(self.trace.memory.len()).expect("a few");
                let regions = (0..self.trace.memory.len()).map(|index| self.region(index));
                [halves(&[count, 0]), regions.collect::<Vec<_>>().concat()].concat()
            }
            Body::Region(index) => [words(&[0]), self.region(index)].concat(),
            Body::Config(offset, len, flags) => {
                [halves(&[offset, len, flags]), vec![0; usize::try_from(len).expect("short")]].concat()
            }
            Body::Writeback(value, flags) => [halves(&[32, 1, flags]), vec![value]].concat(),
            Body::Inflight(rings, size) => {
                [words(&[0, 0]), rings.to_le_bytes().into(), size.to_le_bytes().into(), vec![0; 4]].concat()
            }
            Body::InflightBack => self.inflight.as_ref().map_or(vec![0; 24], |(layout, _)| layout.clone()),
        }
    }

    pub(crate) fn fd(&self, fd: Fd) -> RawFd {
        let of_ring = |ring: u32| self.ring(ring).raw_events();
        match fd {
            // Rings that the guest does not use have descriptors, too.
            Fd::Kick(ring) | Fd::Call(ring) if usize::try_from(ring).expect("small") >= self.rings.len() => {
                self.err.as_raw_fd()
            }
            Fd::Kick(ring) => of_ring(ring).0,
            Fd::Call(ring) => of_ring(ring).1,
            Fd::Err => self.err.as_raw_fd(),
            Fd::Channel => self.channel.0.as_raw_fd(),
            Fd::Memory => self.file.as_raw_fd(),
            Fd::Inflight => self.inflight.as_ref().map_or(self.err.as_raw_fd(), |(_, file)| file.as_raw_fd()),
        }
    }

    /// Send a message and compare the answer.
    pub(crate) fn say(&mut self, socket: &UnixStream, message: &Message) {
        let payload = self.payload(&message.body);
        let fds: Vec<RawFd> = message.fds.iter().map(|fd| self.fd(*fd)).collect();
        let bytes = framed(message.request, message.flags, &payload);
        assert_eq!(socket.send_with_fds(&[&bytes[..]], &fds).expect("the server reads"), bytes.len());
        if message.answer == Answer::None {
            return;
        }
        let answer = receive(socket).expect("an answer").unwrap_or_else(|| panic!("{message:?}: closed"));
        let Received { request, payload: answer, file } = answer;
        assert_eq!(request, message.request, "{message:?}");
        assert_eq!(file.is_some(), message.answer == Answer::Inflight, "{message:?}");
        let expected = match message.answer {
            Answer::None => unreachable!("seen above"),
            Answer::Ack => words(&[0]),
            Answer::Word(word) => words(&[word]),
            Answer::Base => {
                let ring = u32::from_le_bytes(payload[..4].try_into().expect("a state"));
                let index = usize::try_from(ring).expect("small");
                let base = if index < self.rings.len() { self.rings[index].used_base() } else { 0 };
                if self.is_packed() {
                    self.bases[index] = base;
                }
                halves(&[ring, base])
            }
            Answer::Config => {
                let half = |at: usize| u32::from_le_bytes(payload[at..at + 4].try_into().expect("four bytes"));
                let (from, len) = (usize::try_from(half(0)).expect("small"), usize::try_from(half(4)).expect("small"));
                let part = (from..from + len).map(|at| self.reference.get(at).copied().unwrap_or(0));
                [payload[..12].to_vec(), part.collect()].concat()
            }
            Answer::Inflight => {
                // 16 bytes a queue and as many an entry, or 32 for packed rings, in cache lines.
                let unit = if self.is_packed() { 32 } else { 16 };
                let [rings, size] = [16, 18].map(|at| u64::from(u16::from_le_bytes([payload[at], payload[at + 1]])));
                let len = rings * (unit + unit * size).next_multiple_of(64);
                // Behind the fields is padding, which carries what it may.
                [words(&[len, 0]), payload[16..20].to_vec(), answer[20..].to_vec()].concat()
            }
        };
        assert_eq!(answer, expected, "{message:?}");
        self.keep_inflight(answer, file);
    }

    /// The region that came with that answer, if one did.
    pub(crate) fn keep_inflight(&mut self, layout: Vec<u8>, file: Option<File>) {
        self.inflight = file.map(|file| (layout, file)).or(self.inflight.take());
    }

    fn sector(ring: usize) -> u64 {
        SECTOR + SPAN * ring as u64
    }

    /// Put a request into the ring, with these buffers between header and status.
    pub(crate) fn offer(&mut self, ring: usize, kind: u32, buffers: &[(u64, u32, u16)]) {
        let sector = if kind < 2 { Self::sector(ring) } else { 0 };
        let ring = &mut self.rings[ring];
        let at = ring.area();
        ring.write(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat());
        let parts = [&[(at, 16, 0)], buffers, &[(at + 16, 1, WRITE)]].concat();
        let last = parts.len() - 1;
        let link = |(index, (addr, len, flags)): (usize, &(u64, u32, u16))| -> Raw {
            let next = u16::try_from(index + 1).expect("a short chain");
            if index < last { (*addr, *len, flags | NEXT, next) } else { (*addr, *len, *flags, 0) }
        };
        let table: Vec<Raw> = parts.iter().enumerate().map(link).collect();
        if table.len() > 4 {
            let len = u32::try_from(16 * table.len()).expect("short");
            ring.table(at + 0x10_0000, &table);
            ring.descriptor(0, (at + 0x10_0000, len, INDIRECT, 0));
        } else {
            (0..).zip(table).for_each(|(index, descriptor)| ring.descriptor(index, descriptor));
        }
        ring.offer(0);
    }

    /// Serve a request; its answer has so many bytes.
    fn serve(&mut self, ring: usize, kind: u32, buffers: &[(u64, u32, u16)], len: u32) {
        self.offer(ring, kind, buffers);
        let ring = &mut self.rings[ring];
        assert_eq!(ring.take(ANSWER_LIMIT), Some((0, len)), "request {kind}");
        assert_eq!(ring.read(ring.area() + 16, 1), [0], "request {kind}");
    }

    fn write(&mut self, ring: usize, buffers: &[(u64, u32, u16)]) -> u64 {
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.rings[ring].write(buffers[0].0, &pattern(Self::sector(ring), total(buffers) / 512, stamp));
        stamp
    }

    /// Write and read back, in buffers as given, one after the other in memory.
    fn write_and_read(&mut self, ring: usize, buffers: &[(u64, u32)]) {
        let [out, back] =
            [0, WRITE].map(|flags| buffers.iter().map(|(at, len)| (*at, *len, flags)).collect::<Vec<_>>());
        let stamp = self.write(ring, &out);
        self.serve(ring, 1, &out, 1);
        let (at, len) = (out[0].0, total(&out));
        self.rings[ring].write(at, &vec![0; usize::try_from(len).expect("small")]);
        self.serve(ring, 0, &back, u32::try_from(len).expect("small") + 1);
        self.expect_data(ring, at, len / 512, stamp);
        self.stamps[ring] = stamp;
    }

    /// Offer a write; its stamp.
    fn offer_write(&mut self, ring: usize) -> u64 {
        let buffers = [(self.rings[ring].area() + 0x1000, u32::try_from(COUNT * 512).expect("small"), 0)];
        let stamp = self.write(ring, &buffers);
        self.offer(ring, 1, &buffers);
        stamp
    }

    fn expect_data(&self, ring: usize, at: u64, sectors: u64, stamp: u64) {
        let found = self.rings[ring].read(at, usize::try_from(sectors * 512).expect("small"));
        assert!(found == pattern(Self::sector(ring), sectors, stamp), "what was written with {stamp} reads otherwise");
    }

    /// What is in the sectors of that ring.
    fn expect_on_disk(&mut self, ring: usize) {
        let at = self.rings[ring].area() + 0x3000;
        let len = u32::try_from(COUNT * 512).expect("small");
        self.serve(ring, 0, &[(at, len, WRITE)], len + 1);
        self.expect_data(ring, at, COUNT, self.stamps[ring]);
    }

    pub(crate) fn io(&mut self, ring: usize) {
        let at = self.rings[ring].area();
        self.write_and_read(ring, &[(at + 0x1000, 512), (at + 0x1200, 3584)]);
        if self.trace.features & F_FLUSH != 0 {
            self.serve(ring, 4, &[], 1);
        }
        self.serve(ring, 8, &[(at + 0x1000, 20, WRITE)], 21);
        let serial = self.rings[ring].read(at + 0x1000, 20);
        assert_eq!(serial, [SERIAL.as_bytes(), &[0; 20][SERIAL.len()..]].concat());
    }
}

fn total(buffers: &[(u64, u32, u16)]) -> u64 {
    buffers.iter().map(|(_, len, _)| u64::from(*len)).sum()
}

/// A volume whose guests see [`SERIAL`].
pub(crate) fn volume() -> Volume {
    let volume = Volume::absent();
    let primary = volume.primary.to_str().expect("UTF-8");
    let words = ["create", "--primary", primary, "--size", "32M", "--max-remaps", "64", "--serial", SERIAL];
    done(&vhost_remap(&words));
    volume
}

/// All of the configuration there is, as a front-end gets it that asks for nothing else.
pub(crate) fn configuration(server: &Server) -> Vec<u8> {
    let socket = connect(&server.socket);
    let ask =
        |request, payload: &[u8]| socket.send_with_fds(&[&framed(request, PLAIN, payload)[..]], &[]).expect("a reader");
    ask(SET_PROTOCOL_FEATURES, &words(&[PROTOCOL_OFFERED]));
    ask(GET_CONFIG, &[halves(&[0, 96, 0]), vec![0; 96]].concat());
    let answer = receive(&socket).expect("an answer").expect("an open connection").payload;
    assert_eq!(answer[12..20], CAPACITY.to_le_bytes());
    assert_eq!(answer[12 + 34..][..2], 64_u16.to_le_bytes());
    answer[12..].to_vec()
}

/// A trace under way.
pub(crate) struct Replay<'a> {
    volume: Volume,
    pub(crate) server: Server,
    pub(crate) vm: Vm<'a>,
    socket: Option<UnixStream>,
    /// Number of the last event that was waited for.
    events: u64,
    /// What a write holds that waits for the primary.
    held: u64,
}

impl<'a> Replay<'a> {
    fn serve(volume: &Volume) -> Server {
        volume.serve(&["--on-device-loss", "hold"])
    }

    pub(crate) fn new(trace: &'a Trace) -> Replay<'a> {
        println!("{}", trace.name);
        let volume = volume();
        let server = Self::serve(&volume);
        let vm = Vm::new(trace, &configuration(&server));
        Replay { volume, server, vm, socket: None, events: 0, held: 0 }
    }

    /// Go through the trace, and leave the last connection as it is.
    pub(crate) fn run(mut self) -> Replay<'a> {
        for step in &self.vm.trace.steps {
            self = self.step(step);
        }
        self
    }

    fn step(mut self, step: &Step) -> Replay<'a> {
        let Replay { server, vm, socket, events, held, .. } = &mut self;
        match *step {
            Step::Say(ref message) => vm.say(socket.get_or_insert_with(|| connect(&server.socket)), message),
            Step::Io(ring) => vm.io(ring),
            Step::Long(ring, buffers) => {
                assert!(vm.trace.features & F_INDIRECT != 0 && buffers > vm.trace.size, "no long chain");
                let at = vm.rings[ring].area() + 0x10000;
                let buffers: Vec<_> = (0..u64::from(buffers)).map(|index| (at + 1024 * index, 1024)).collect();
                vm.write_and_read(ring, &buffers);
            }
            Step::Hold(ring) => {
                server.fault(&["--ops", "read,write,flush,discard,identify", "--errno", "ENODEV"]);
                *held = vm.offer_write(ring);
                *events = server.await_event_after("device-gone", *events).seq;
                assert_eq!(vm.rings[ring].take(Duration::ZERO), None);
            }
            Step::Return => {
                server.no_faults();
                server.await_status(|status| status.state == ["ok"]);
            }
            Step::Held(ring) => {
                assert_eq!(vm.rings[ring].take(ANSWER_LIMIT), Some((0, 1)));
                vm.stamps[ring] = *held;
                vm.expect_on_disk(ring);
            }
            Step::Dropped(ring) => vm.expect_on_disk(ring),
            Step::Driver => {
                vm.rings.iter_mut().for_each(|ring| ring.restart_at(0));
                vm.bases.fill(PACKED_START);
            }
            Step::HangUp => *socket = None,
            Step::Crash => {
                self.server.kill();
                let server = Self::serve(&self.volume);
                return Replay { server, socket: None, events: 0, ..self };
            }
        }
        self
    }
}

/// O3, O5, E5: in the order and with the flags, sizes and descriptors of their sources, to the last request.
#[test]
fn each_front_end_gets_the_answers_it_waits_for_and_its_guest_the_disk() {
    let traces = traces();
    std::thread::scope(|scope| {
        for trace in &traces {
            scope.spawn(move || {
                let mut replay = Replay::new(trace).run();
                for ring in &mut replay.vm.rings {
                    assert_eq!(ring.take(Duration::ZERO), None, "nothing is answered twice");
                    assert_eq!(ring.used_idx(), ring.avail_idx());
                }
                replay.server.stop();
            });
        }
    });
}

/// F1, O3: it does not flush, and neither after the reset nor to the server's successor does anyone say why.
#[test]
fn a_driver_that_chose_write_through_has_it_after_a_reset_and_a_kill_of_the_server() {
    let trace = qemu_in_write_through();
    let mut replay = Replay::new(&trace).run();
    replay.server.fault(&["--ops", "flush", "--count", "1"]);
    replay.vm.offer_write(0);
    let ring = &mut replay.vm.rings[0];
    assert_eq!(ring.take(ANSWER_LIMIT), Some((0, 1)));
    assert_eq!(ring.read(ring.area() + 16, 1), [1], "answered as done before it was durable");
}
