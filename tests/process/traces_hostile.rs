//! Front-ends that are not as they should be: the table of them with one message left out, repeated, out of its turn,
//! or damaged, and front-ends that stop halfway. The server refuses, or closes the connection with one line in its log;
//! it keeps nothing, and serves whoever comes next.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::framework::{SETUP, chain, status};
use crate::frontend::{FrontEnd, WRITE};
use crate::guest::ANSWER_LIMIT;
use crate::model::pattern;
use crate::server::{Server, Volume};
use crate::traces::{Step, Vm, configuration};
use crate::traces_frontends::{Trace, traces};
use crate::traces_messages::{
    GET_CONFIG, GET_FEATURES, GET_PROTOCOL_FEATURES, Message, NEED_REPLY, PLAIN, REM_MEM_REG, SET_BACKEND_REQ_FD,
    SET_FEATURES, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_NUM, connect, framed, receive, words,
};

/// What is wrong with one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    LeftOut,
    Twice,
    /// After the next one.
    Late,
    Flags(u32),
    /// A payload of one byte less or more.
    Shorter,
    Longer,
    /// The header alone says that there is so much.
    Claims(u32),
    NoFiles,
    /// One more than belongs there.
    MoreFiles,
    /// A device, which can be neither mapped nor waited for.
    OtherFiles,
    /// The end of the connection in the middle of header or payload.
    CutHeader,
    CutPayload,
    /// Every bit of the payload.
    Zeros,
    Ones,
    /// Another request, that is none or was not offered.
    Request(u32),
}

/// RESET_OWNER is ignored and CHECK_DEVICE_STATE answered, whatever was negotiated.
const HARMLESS: [u32; 2] = [4, 43];

/// Requests of the protocol up to 45 that no trace has, and numbers beyond.
fn other_requests() -> impl Iterator<Item = Fault> {
    let own = [1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 25, 31, 32, 34, 36, 37, 38];
    (0..50).chain([1 << 16, u32::MAX]).filter(move |request| !own.contains(request)).map(Fault::Request)
}

impl Fault {
    fn all_of(message: &Message, payload: usize) -> Vec<Fault> {
        use Fault::{Claims, CutHeader, CutPayload, Flags, Late, LeftOut, Longer, MoreFiles, Ones, Twice, Zeros};
        let mut faults = vec![LeftOut, Twice, Late, Longer, MoreFiles, CutHeader, Claims(4097), Claims(u32::MAX)];
        // No version, a later one, an answer, a bit that means nothing; an answer that may not have been negotiated.
        faults.extend([0, 2, 5, 0x11, NEED_REPLY].map(Flags));
        if payload > 0 {
            faults.extend([Fault::Shorter, CutPayload, Zeros, Ones]);
        }
        if !message.fds.is_empty() {
            faults.extend([Fault::NoFiles, Fault::OtherFiles]);
        }
        if [SET_OWNER, SET_FEATURES].contains(&message.request) {
            faults.extend(other_requests());
        }
        faults
    }

    /// Whether no connection can go on after it.
    fn closes(self, message: &Message) -> bool {
        match self {
            Fault::Flags(flags) => flags != NEED_REPLY,
            Fault::Request(request) => !HARMLESS.contains(&request),
            // The protocol lets removals come with a descriptor, or without one.
            Fault::NoFiles | Fault::MoreFiles => message.request != REM_MEM_REG,
            // The crate takes this one with any payload, and looks at none.
            Fault::Longer => message.request != SET_BACKEND_REQ_FD,
            Fault::Shorter | Fault::Claims(_) | Fault::CutHeader | Fault::CutPayload => true,
            Fault::LeftOut | Fault::Twice | Fault::Late | Fault::OtherFiles | Fault::Zeros | Fault::Ones => false,
        }
    }
}

/// A front-end of which nothing is expected but that it gets no answers out of turn.
struct Suspect<'a> {
    vm: Vm<'a>,
    socket: UnixStream,
    null: fs::File,
    closed: bool,
}

impl Suspect<'_> {
    /// Send a message, damaged or not, and take what comes back, until a question after it is answered.
    fn send(&mut self, message: &Message, fault: Option<Fault>) {
        let mut payload = self.vm.payload(&message.body);
        let mut fds: Vec<RawFd> = message.fds.iter().map(|fd| self.vm.fd(*fd)).collect();
        let (mut request, mut flags) = (message.request, message.flags);
        match fault {
            Some(Fault::Flags(other)) => flags = other,
            Some(Fault::Request(other)) => request = other,
            Some(Fault::Shorter) => drop(payload.pop()),
            Some(Fault::Longer) => payload.push(0),
            Some(Fault::Zeros) => payload.fill(0),
            Some(Fault::Ones) => payload.fill(0xff),
            Some(Fault::NoFiles) => fds.clear(),
            Some(Fault::MoreFiles) => fds.push(self.null.as_raw_fd()),
            Some(Fault::OtherFiles) => fds.fill(self.null.as_raw_fd()),
            _ => {}
        }
        let mut bytes = framed(request, flags, &payload);
        match fault {
            Some(Fault::Claims(size)) => bytes[8..12].copy_from_slice(&size.to_le_bytes()),
            Some(Fault::CutHeader) => bytes.truncate(6),
            Some(Fault::CutPayload) => bytes.truncate(12 + payload.len() / 2),
            _ => {}
        }
        self.write(&bytes, &fds);
        if matches!(fault, Some(Fault::CutHeader | Fault::CutPayload)) {
            let _ = self.socket.shutdown(Shutdown::Write);
        } else {
            self.write(&framed(GET_PROTOCOL_FEATURES, PLAIN, &[]), &[]);
        }
        let mut questions = 1 + u32::from(request == GET_PROTOCOL_FEATURES);
        while questions > 0 && !self.closed {
            match receive(&self.socket) {
                Ok(Some(answer)) if answer.request == GET_PROTOCOL_FEATURES => questions -= 1,
                Ok(Some(answer)) => {
                    assert_eq!(answer.request, request, "an answer to something else");
                    self.vm.keep_inflight(answer.payload, answer.file);
                }
                Ok(None) => self.closed = true,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => self.closed = true,
                Err(error) => panic!("no answer and no end: {error}"),
            }
        }
    }

    fn write(&mut self, bytes: &[u8], fds: &[RawFd]) {
        match self.socket.send_with_fds(&[bytes], fds) {
            Ok(sent) => assert_eq!(sent, bytes.len()),
            Err(error) if [libc::EPIPE, libc::ECONNRESET].contains(&error.errno()) => self.closed = true,
            Err(error) => panic!("the server does not read: {error}"),
        }
    }
}

/// What a process has open and mapped of others' memory.
#[derive(Debug, PartialEq, Eq)]
struct Footprint {
    files: usize,
    mapped: u64,
}

impl Footprint {
    fn of(server: &Server) -> Footprint {
        let proc = format!("/proc/{}", server.pid());
        let maps = fs::read_to_string(format!("{proc}/maps")).expect("a running server");
        let len = |line: &str| {
            let (start, end) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')).expect("a range");
            let [start, end] = [start, end].map(|number| u64::from_str_radix(number, 16).expect("an address"));
            end - start
        };
        let mapped = maps.lines().filter(|line| line.contains("/memfd:")).map(len).sum();
        Footprint { files: fs::read_dir(format!("{proc}/fd")).expect("a running server").count(), mapped }
    }
}

/// A front-end as it should be reads a sector, with all before it gone from the server.
fn served_well(server: &Server) -> Footprint {
    let mut front_end = FrontEnd::connect(&server.socket, SETUP);
    let ring = &mut front_end.rings[0];
    chain(ring, 0, 0, 1000);
    ring.offer(0);
    assert_eq!(ring.take(ANSWER_LIMIT), Some((0, 513)));
    assert_eq!(status(ring, 0), 0);
    assert!(ring.read(ring.area() + 512, 512) == pattern(1000, 1, 1));
    Footprint::of(server)
}

/// The server as it is before the first suspect, and its log up to there.
struct Watched {
    server: Server,
    footprint: Footprint,
    log: usize,
    configuration: Vec<u8>,
}

impl Watched {
    fn new(volume: &Volume) -> Watched {
        let server = volume.serve(&[]);
        server.guest(1).write(1000, pattern(1000, 8, 1)).expect("a good disk");
        served_well(&server);
        let footprint = served_well(&server);
        let mut watched = Watched { server, footprint, log: 0, configuration: Vec::new() };
        watched.check(&mut Vec::new());
        watched
    }

    /// Nothing is left of who was there, who comes next is served, and the log says so. Gives lines of warnings.
    fn check(&mut self, warnings: &mut Vec<String>) {
        assert_eq!(served_well(&self.server), self.footprint);
        // As the last one left it: the cache mode is the disk's, not the connection's.
        self.configuration = configuration(&self.server);
        let log = self.server.log_text();
        // The last line may be half written, as nobody waits for it.
        let whole = log.rfind('\n').map_or(0, |end| end + 1);
        warnings.extend(log[self.log..whole].lines().filter(|line| !line.contains(" INFO ")).map(str::to_owned));
        self.log = whole;
        assert!(warnings.iter().all(|line| line.contains(" WARN ")), "{warnings:?}");
    }
}

/// Messages up to the first end of the connection, and what the guest does between them.
fn first_connection(trace: &Trace) -> &[Step] {
    let ends = |step: &Step| matches!(step, Step::Hold(_) | Step::HangUp | Step::Crash);
    &trace.steps[..trace.steps.iter().position(ends).expect("each ends its connection")]
}

/// Go through the first connection of a trace, with one message at fault.
fn go_through(watched: &mut Watched, trace: &Trace, at: usize, fault: Fault) {
    let mut suspect = Suspect {
        vm: Vm::new(trace, &watched.configuration),
        socket: connect(&watched.server.socket),
        null: fs::File::options().read(true).write(true).open("/dev/null").expect("a device"),
        closed: false,
    };
    let mut late = None;
    for (index, step) in first_connection(trace).iter().enumerate() {
        match step {
            _ if suspect.closed => break,
            Step::Say(message) if index < at => suspect.vm.say(&suspect.socket, message),
            Step::Say(message) if index > at => {
                suspect.send(message, None);
                if let Some(late) = late.take() {
                    suspect.send(late, None);
                }
            }
            Step::Say(message) => match fault {
                Fault::LeftOut => {}
                Fault::Late => late = Some(message),
                Fault::Twice => {
                    suspect.send(message, None);
                    suspect.send(message, None);
                }
                _ => suspect.send(message, Some(fault)),
            },
            // A request is there, for a ring that may or may not be served.
            Step::Io(ring) | Step::Long(ring, _) => {
                let place = &suspect.vm.rings[*ring];
                if place.used_idx() == place.avail_idx() {
                    let at = place.area() + 0x1000;
                    suspect.vm.offer(*ring, 0, &[(at, 4096, WRITE)]);
                }
            }
            Step::Driver => suspect.vm.rings.iter_mut().for_each(|ring| ring.restart_at(0)),
            _ => unreachable!("not in a first connection"),
        }
    }
    let closed = suspect.closed;
    drop(suspect);
    let mut warnings = Vec::new();
    watched.check(&mut warnings);
    let ends = warnings.iter().filter(|line| line.contains("the connection is closed: ")).count();
    assert_eq!(ends, usize::from(closed), "{warnings:?}");
    let Step::Say(message) = &first_connection(trace)[at] else { unreachable!("faults are those of messages") };
    if fault.closes(message) {
        assert!(closed && warnings.len() == 1, "the connection was not closed for it: {warnings:?}");
    }
}

/// Says what was at fault when its run panics.
struct Shown<'a>(&'a str, &'a Message, Fault);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {:?} of {:?}", self.0, self.2, self.1);
        }
    }
}

fn check_faults(trace: &Trace) -> usize {
    let volume = Volume::create(32, 64);
    let mut watched = Watched::new(&volume);
    let mut seen = Vec::new();
    let mut count = 0;
    for (at, step) in first_connection(trace).iter().enumerate() {
        let Step::Say(message) = step else { continue };
        // Said in the same way before: a start is like another.
        let said = format!("{message:?}");
        if seen.contains(&said) {
            continue;
        }
        seen.push(said);
        let payload = Vm::new(trace, &watched.configuration).payload(&message.body).len();
        for fault in Fault::all_of(message, payload) {
            let _shown = Shown(trace.name, message, fault);
            go_through(&mut watched, trace, at, fault);
            count += 1;
        }
    }
    watched.server.stop();
    count
}

/// E5, O5.
#[test]
fn a_front_end_with_one_message_at_fault_is_refused_or_leaves_and_nothing_of_it_stays() {
    let traces = traces();
    std::thread::scope(|scope| {
        // A guest with Windows has the front-end of the one before it.
        for trace in traces.iter().filter(|trace| trace.name != "Windows") {
            scope.spawn(move || println!("{}: {} variants", trace.name, check_faults(trace)));
        }
    });
}

/// A front-end that has asked for more than it reads, until nobody takes any more.
fn unread_answers(server: &Server) -> UnixStream {
    let socket = connect(&server.socket);
    let mut question = framed(GET_CONFIG, PLAIN, &[&[0; 12][..], &[0; 4000]].concat());
    question[16..20].copy_from_slice(&4000_u32.to_le_bytes());
    (&socket).write_all(&framed(SET_PROTOCOL_FEATURES, PLAIN, &words(&[1 << 9]))).expect("the server reads");
    socket.set_nonblocking(true).expect("a socket");
    let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
    while poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&limit)).expect("a socket") == 1 {
        match (&socket).write(&question) {
            Ok(len) if len == question.len() => {}
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
    }
    socket
}

/// A front-end that stops after so many bytes of its second message.
fn part_of_a_message(server: &Server, len: usize) -> UnixStream {
    let socket = connect(&server.socket);
    let part = &framed(SET_VRING_NUM, PLAIN, &[0; 8])[..len];
    (&socket).write_all(&[&framed(GET_FEATURES, PLAIN, &[]), part].concat()).expect("the server reads");
    assert!(receive(&socket).is_ok_and(|answer| answer.is_some_and(|answer| answer.request == GET_FEATURES)));
    socket
}

/// O5.
#[test]
fn a_shutdown_waits_for_no_front_end_that_stops_halfway() {
    let ways: [fn(&Server) -> UnixStream; 3] =
        [unread_answers, |server| part_of_a_message(server, 3), |server| part_of_a_message(server, 14)];
    std::thread::scope(|scope| {
        for way in ways {
            scope.spawn(move || {
                let volume = Volume::create(32, 64);
                let server = volume.serve(&[]);
                let _open = way(&server);
                server.stop();
            });
        }
    });
}

/// E5: it need not leave by itself.
#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_is_cut_off() {
    std::thread::scope(|scope| {
        for len in [1, 11, 12, 19] {
            scope.spawn(move || {
                let volume = Volume::create(32, 64);
                let mut watched = Watched::new(&volume);
                let socket = part_of_a_message(&watched.server, len);
                // A reset where the server has left something unread.
                let end = (&socket).read(&mut [0]).map_err(|error| error.kind());
                assert!(matches!(end, Ok(0) | Err(ErrorKind::ConnectionReset)), "{len} bytes: {end:?}");
                let mut warnings = Vec::new();
                watched.check(&mut warnings);
                assert!(warnings.len() == 1 && warnings[0].contains("the connection is closed: "), "{warnings:?}");
            });
        }
    });
}

/// Whoever does not read its answers keeps the next one waiting only as long as it is there.
#[test]
fn a_front_end_that_reads_no_answers_leaves_nothing_when_it_goes() {
    let volume = Volume::create(32, 64);
    let mut watched = Watched::new(&volume);
    drop(unread_answers(&watched.server));
    let mut warnings = Vec::new();
    watched.check(&mut warnings);
    assert!(warnings.len() <= 1, "{warnings:?}");
}
