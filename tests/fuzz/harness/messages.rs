//! Messages of a front-end, with descriptors, against the protocol thread and its workers.
//!
//! Whatever comes, the session ends when its socket does, every answer is well-formed and to a message that was
//! sent, no descriptor stays behind, and the next front-end sets up a queue and reads a sector.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_remap::device::Wait;
use vhost_remap::engine::healer::{OnLoss, Policy};
use vhost_remap::runtime::worker::Clock;
use vhost_remap::vhost::device::BlkDevice;
use vhost_remap::vhost::inflight::InflightRegion;
use vhost_remap::vhost::server::Server;
use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::program::Program;
use super::volume;

/// A session that takes longer hangs; an honest one takes less than a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a front-end that stays waits for the first of its requests: most are served sooner.
const LINGER: Duration = Duration::from_micros(300);
/// Messages of one input: their answers fit into a socket's buffer, because nobody reads them meanwhile.
const MESSAGES_MAX: usize = 64;
/// A payload no handler reads to its end.
const PAYLOAD_MAX: usize = 4200;

/// Guest memory: one file, at these addresses of the guest and of the front-end.
const MEMORY: u64 = 0x2_0000;
const USER: u64 = 0x5500_0000_0000;
/// Where queue 0 has its parts, those of the others follow; then the requests that it was offered.
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const QUEUE_SPAN: u64 = 0x1000;
const AREA: u64 = 0x8000;
const QUEUE_SIZE: u16 = 16;

/// What a status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// What makes a descriptor of a packed ring available in the first lap.
const AVAIL_IN_PACKED: u16 = 1 << 7;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_LOG_BASE: u32 = 6;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// The front-end wants to know what is written to memory (VHOST_F_LOG_ALL).
const F_LOG_ALL: u64 = 1 << 26;

/// Rings are packed.
const F_PACKED: u64 = 1 << 34;

/// The protocol knows 1 to 44 or so.
const CODES_END: usize = 48;
const INDICES: [u32; 8] = [0, 1, 2, 3, 63, 64, 0xffff, u32::MAX];
const NUMBERS: [u32; 12] = [0, 1, 2, 8, 16, 256, 257, 32_768, 65_535, 65_536, 1 << 31, u32::MAX];
const ADDRESSES: [u64; 14] = [
    0,
    0x1000,
    0x8000,
    MEMORY,
    USER,
    USER + 0x400,
    USER + 0x800,
    USER + 0x1000,
    USER + MEMORY,
    USER + MEMORY - 2,
    1 << 47,
    1 << 63,
    u64::MAX - 0xfff,
    u64::MAX,
];

/// The server, its volume and the descriptors that are passed, for the life of the process.
struct Bench {
    server: Server,
    device: Arc<BlkDevice>,
    shutdown: OwnedFd,
    memory: File,
    short: File,
    null: File,
    inflight: (File, u64),
    event: OwnedFd,
}

fn memfd(len: u64) -> File {
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("descriptors are left");
    ftruncate(&file, len).expect("memory is left");
    File::from(file)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("descriptors are left")
}

impl Bench {
    fn new() -> Bench {
        let (sender, ports) = std::sync::mpsc::channel();
        // The healer lives on its thread, as the runtime's does.
        let _ = std::thread::spawn(move || {
            let policy = Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false };
            let (mut keeper, ports) = volume::open(&volume::disks(), policy, 2);
            let clock = Clock::start();
            sender.send(ports).expect("somebody waits for them");
            loop {
                let wait = keeper.wake_at().map_or(Wait::Forever, Wait::Until);
                keeper.turn(clock.now(), wait);
            }
        });
        let ports = ports.recv().expect("the volume opens");
        let device = Arc::new(BlkDevice::new(ports[0].disk.clone(), 64));
        let server = Server::new(None, device.clone(), ports).expect("threads are left");
        let null = File::options().read(true).write(true).open("/dev/null").expect("there is one");
        let inflight = InflightRegion::create(64, QUEUE_SIZE, true).expect("memory is left");
        let (memory, short) = (memfd(MEMORY), memfd(0x1000));
        let bench = Bench { server, device, shutdown: event(), memory, short, null, inflight, event: event() };
        // Threads open what they need when they begin.
        honest_session(&bench);
        bench
    }

    /// Fresh memory in which `count` requests are offered on each of four queues, of which the last is a packed one.
    fn reset(&self, count: u8, kind: u32) {
        let write = |at: u64, bytes: &[u8]| self.memory.write_all_at(bytes, at).expect("it has the room");
        write(0, &vec![0; usize::try_from(MEMORY).expect("small")]);
        self.inflight.0.write_all_at(&vec![0; usize::try_from(self.inflight.1).expect("small")], 0).expect("as above");
        let count = u16::from(count % 6);
        for queue in 0..4 {
            let ring = queue * QUEUE_SPAN;
            for request in 0..count {
                let area = AREA + queue * QUEUE_SPAN + u64::from(request) * 0x400;
                write(area, &kind.to_le_bytes());
                write(area + 0x10, &[UNTOUCHED]);
                let data = if kind == 0 { WRITE } else { 0 };
                let chain = [(0, 16, NEXT), (0x100, 512, NEXT | data), (0x10, 1, WRITE)];
                for (at, (offset, len, flags)) in (request * 3..).zip(chain) {
                    let rest = match queue {
                        3 => descriptor_rest(len, request, flags | AVAIL_IN_PACKED),
                        _ => descriptor_rest(len, flags, at + 1),
                    };
                    let words = [(area + offset).to_le_bytes(), rest].concat();
                    write(ring + 16 * u64::from(at), &words);
                }
                write(ring + AVAIL + 4 + 2 * u64::from(request), &(request * 3).to_le_bytes());
            }
            write(ring + AVAIL + 2, &count.to_le_bytes());
        }
    }

    fn used_index(&self) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, USED + 2).expect("it is there");
        u16::from_le_bytes(bytes)
    }
}

fn descriptor_rest(len: u32, third: u16, fourth: u16) -> [u8; 8] {
    (u64::from(len) | u64::from(third) << 32 | u64::from(fourth) << 48).to_le_bytes()
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn halves(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A message, and which descriptors go with it.
struct Message {
    code: u32,
    flags: u32,
    size: u32,
    payload: Vec<u8>,
    fds: Vec<RawFd>,
}

impl Message {
    /// One that asks for an answer.
    fn new(code: u32, payload: Vec<u8>, fds: &[RawFd]) -> Message {
        let size = u32::try_from(payload.len()).expect("short");
        Message { code, flags: 9, size, payload, fds: fds.to_vec() }
    }

    fn send(&self, socket: &UnixStream) -> bool {
        let header = halves(&[self.code, self.flags, self.size]);
        let parts: &[&[u8]] = &[&header, &self.payload];
        socket.send_with_fds(parts, &self.fds).is_ok_and(|sent| sent == header.len() + self.payload.len())
    }
}

/// What a well-behaved front-end says to set up a queue.
fn set_up(bench: &Bench, queue: u32, enable: bool, more: u64) -> Vec<Message> {
    let (index, ring) = (u64::from(queue), USER + u64::from(queue % 4) * QUEUE_SPAN);
    let message = Message::new;
    vec![
        message(SET_OWNER, Vec::new(), &[]),
        message(GET_FEATURES, Vec::new(), &[]),
        message(SET_PROTOCOL_FEATURES, words(&[0x18_b22b]), &[]),
        message(SET_FEATURES, words(&[bench.device.offered_features() | F_LOG_ALL | more]), &[]),
        message(ADD_MEM_REG, words(&[0, 0, MEMORY, USER, 0]), &[bench.memory.as_raw_fd()]),
        message(SET_VRING_NUM, halves(&[queue, u32::from(QUEUE_SIZE)]), &[]),
        message(SET_VRING_BASE, halves(&[queue, 0]), &[]),
        message(SET_VRING_ADDR, words(&[index, ring, ring + USED, ring + AVAIL, 0]), &[]),
        message(SET_VRING_CALL, words(&[index]), &[bench.event.as_raw_fd()]),
        message(SET_VRING_KICK, words(&[index]), &[bench.event.as_raw_fd()]),
        message(SET_VRING_ENABLE, halves(&[queue, u32::from(enable)]), &[]),
    ]
}

fn number(program: &mut Program<'_>) -> u32 {
    if program.u8() < 224 { program.pick(&NUMBERS) } else { program.u32() }
}

fn address(program: &mut Program<'_>) -> u64 {
    if program.u8() < 224 { program.pick(&ADDRESSES) } else { program.u64() }
}

/// The payload that a message of this kind has, with numbers that make sense or not.
fn payload(program: &mut Program<'_>, code: u32) -> Vec<u8> {
    match code {
        SET_FEATURES | SET_PROTOCOL_FEATURES => words(&[address(program) | u64::from(program.u16()) << 16]),
        SET_LOG_BASE => {
            let (len, start) = (program.pick(&[8, 0x180, 0x1000, 0, 1 << 40]), program.pick(&[0, 8, 0xff8, 1 << 63]));
            words(&[len, start])
        }
        SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
            halves(&[program.pick(&INDICES), number(program)])
        }
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
            words(&[u64::from(program.pick(&INDICES)) | program.pick(&[0, 0x100, 0x200])])
        }
        SET_VRING_ADDR => {
            let mut ring =
                || if program.u8() < 128 { program.pick(&ADDRESSES) } else { USER + u64::from(program.u16()) };
            let parts = [ring(), ring(), ring(), ring()];
            [halves(&[program.pick(&INDICES), number(program)]), words(&parts)].concat()
        }
        SET_MEM_TABLE => {
            let count = program.pick(&[0_u32, 1, 2, 8, 9]);
            let regions = (0..count.min(8)).flat_map(|_| {
                let region = [address(program), address(program), address(program), u64::from(number(program))];
                words(&region)
            });
            let regions: Vec<u8> = regions.collect();
            [halves(&[count, 0]), regions].concat()
        }
        ADD_MEM_REG | REM_MEM_REG => match program.below(4) {
            0 => words(&[0, 0, MEMORY, USER, 0]),
            1 => words(&[0, 1 << 20, MEMORY, 1 << 32, 0]),
            _ => words(&[0, address(program), address(program), address(program), u64::from(number(program))]),
        },
        GET_CONFIG | SET_CONFIG => {
            let len = program.below(64);
            [halves(&[number(program), u32::try_from(len).expect("small"), number(program)]), vec![program.u8(); len]]
                .concat()
        }
        GET_INFLIGHT_FD | SET_INFLIGHT_FD => {
            let (queues, size) = (u64::from(number(program)) & 0xffff, u64::from(number(program)) & 0xffff);
            words(&[address(program), address(program), queues | size << 16])
        }
        _ => {
            let len = program.pick(&[0, 0, 8, 12, 16, 24, 40, 48]);
            program.bytes(len).to_vec()
        }
    }
}

/// What goes with a message of that kind, where nothing else is chosen.
fn fitting(bench: &Bench, code: u32) -> Vec<RawFd> {
    match code {
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => vec![bench.event.as_raw_fd()],
        ADD_MEM_REG | SET_MEM_TABLE => vec![bench.memory.as_raw_fd()],
        SET_INFLIGHT_FD => vec![bench.inflight.0.as_raw_fd()],
        SET_LOG_BASE => vec![bench.short.as_raw_fd()],
        _ => Vec::new(),
    }
}

/// The messages that the bytes describe, in order, and whether each has the size it says.
fn read_messages(bench: &Bench, program: &mut Program<'_>) -> (Vec<Message>, bool) {
    let (mut messages, mut in_step) = (Vec::new(), true);
    let files = [&bench.memory, &bench.short, &bench.null, &bench.inflight.0].map(|file| file.as_raw_fd());
    while !program.is_done() && messages.len() < MESSAGES_MAX {
        let how = program.u8();
        if how & 7 == 0 {
            let packed = if how & 0x10 == 0 { 0 } else { F_PACKED };
            messages.extend(set_up(bench, program.pick(&INDICES), how & 8 == 0, packed));
            continue;
        }
        if how & 7 == 1 {
            // The only region of in-flight requests that fits the queues.
            let region = words(&[bench.inflight.1, 0, 64 | u64::from(QUEUE_SIZE) << 16]);
            messages.push(Message::new(SET_INFLIGHT_FD, region, &[bench.inflight.0.as_raw_fd()]));
            continue;
        }
        let code = u32::try_from(program.below(CODES_END)).expect("small");
        let mut message = Message::new(code, payload(program, code), &fitting(bench, code));
        if how & 8 != 0 {
            message.flags = program.pick(&[1, 9, 0, 5, 13, 2, 3, 0x21, u32::MAX]);
        }
        if how & 0x10 != 0 {
            let count = program.pick(&[0, 1, 1, 2, 8, 9, 33]);
            message.fds = (0..count)
                .map(|_| program.pick(&[files[0], files[1], files[2], files[3], bench.event.as_raw_fd()]))
                .collect();
        }
        if how & 0x20 != 0 {
            message.payload.resize(message.payload.len() + program.below(64), program.u8());
            message.size = u32::try_from(message.payload.len()).expect("short");
        }
        if how & 0xc0 == 0xc0 {
            message.size = program.pick(&[0, 1, 4, 8, 4096, 4097, 1 << 16, 1 << 31, u32::MAX]);
            message.payload.resize(message.payload.len().max(program.below(16) * 300).min(PAYLOAD_MAX), 0);
            in_step &= usize::try_from(message.size).is_ok_and(|size| size == message.payload.len());
        }
        messages.push(message);
    }
    messages.truncate(MESSAGES_MAX);
    (messages, in_step)
}

/// What the server answered, as (code, payload); panics at what is no answer.
fn answers(mut socket: UnixStream) -> Vec<(u32, Vec<u8>)> {
    let mut bytes = Vec::new();
    // The end of the connection may come as a reset where the server had not read everything.
    let _ = socket.read_to_end(&mut bytes);
    let mut rest = &bytes[..];
    let mut answers = Vec::new();
    while let Some((header, after)) = rest.split_at_checked(12) {
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(word(4), 5, "an answer has version 1 and the reply flag");
        let len = usize::try_from(word(8)).expect("64 bits");
        assert!(len <= after.len(), "an answer of {len} bytes has {}", after.len());
        answers.push((word(0), after[..len].to_vec()));
        rest = &after[len..];
    }
    assert!(rest.is_empty(), "half an answer: {rest:?}");
    answers
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc is mounted").count()
}

/// A session of these messages, with `until` deciding when the front-end hangs up.
fn session(bench: &Bench, messages: &[Message], until: impl FnOnce() + Send) -> Vec<(u32, Vec<u8>)> {
    let (ours, theirs) = UnixStream::pair().expect("descriptors are left");
    // Nobody reads meanwhile: what does not fit into the buffer is not said.
    ours.set_nonblocking(true).expect("a socket");
    let _ = messages.iter().all(|message| message.send(&ours));
    ours.set_nonblocking(false).expect("a socket");
    let start = Instant::now();
    std::thread::scope(|scope| {
        let hang_up = || {
            until();
            let _ = ours.shutdown(std::net::Shutdown::Write);
        };
        let waiting = scope.spawn(hang_up);
        bench.server.serve(theirs, bench.shutdown.as_fd()).expect("waiting for a socket does not fail");
        waiting.join().expect("waits in bounds");
    });
    assert!(start.elapsed() < PATIENCE, "the session took {:?}", start.elapsed());
    answers(ours)
}

/// The next front-end is served: it sets up a queue and reads a sector.
fn honest_session(bench: &Bench) {
    bench.reset(1, 0);
    let _ = rustix::io::write(&bench.event, &1_u64.to_ne_bytes());
    let answers = session(bench, &set_up(bench, 0, true, 0), || {
        let deadline = Instant::now() + PATIENCE;
        while bench.used_index() == 0 {
            assert!(Instant::now() < deadline, "the next front-end's request is not served");
            std::thread::yield_now();
        }
    });
    for (code, payload) in answers.iter().filter(|(code, _)| *code != GET_FEATURES) {
        assert_eq!(payload, &words(&[0]), "message {code} of the next front-end was refused");
    }
    let mut status = [0];
    bench.memory.read_exact_at(&mut status, AREA + 0x10).expect("it is there");
    assert_eq!((answers.len(), status), (10, [0]), "the next front-end reads");
}

/// Say what the bytes describe; the first two say what the guest had offered before.
pub(crate) fn messages(data: &[u8]) {
    static BENCH: OnceLock<Mutex<Bench>> = OnceLock::new();
    let bench = BENCH.get_or_init(|| Mutex::new(Bench::new())).lock().unwrap_or_else(PoisonError::into_inner);
    let mut program = Program::new(data);
    bench.reset(program.u8(), u32::from(program.u8() % 16));
    let before = open_descriptors();
    let (messages, in_step) = read_messages(&bench, &mut program);
    let _ = rustix::io::write(&bench.event, &1_u64.to_ne_bytes());
    // Now and then the workers get a moment before the front-end is gone.
    let linger = if data.first().is_some_and(|first| *first >= 0x80) { LINGER } else { Duration::ZERO };
    let answers = session(&bench, &messages, || {
        let start = Instant::now();
        while start.elapsed() < linger && bench.used_index() == 0 {
            std::thread::yield_now();
        }
    });
    let mut sent = messages.iter().map(|message| message.code);
    for (code, _) in &answers {
        assert!(!in_step || sent.any(|sent| sent == *code), "an answer to message {code}, which was not sent");
    }
    honest_session(&bench);
    // Workers close what they were given when the session has ended, not before.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (now, in_flight) = (open_descriptors(), bench.server.status().in_flight());
        if now <= before && in_flight == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{before} descriptors before, now {now}; {in_flight} requests under way");
        std::thread::yield_now();
    }
}
