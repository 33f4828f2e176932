//! A vhost-user server for one volume: accepts front-ends, one after the other, and runs the workers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::ioctl_fionread;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::channel;
use super::crew::Crew;
use super::device::BlkDevice;
use super::session::{Session, is_refusal};
use super::status::ServerStatus;
use super::wait::{is_passing, wait_for, wait_until};
use crate::runtime::handover::HeldVolume;
use crate::runtime::worker::WorkerPort;

/// How long the rest of a message may take: a front-end that stops in the middle of one must not keep a
/// shutdown waiting.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A front-end that has said nothing for so long has said what it has to say for now.
const QUIET: Duration = Duration::from_secs(1);

/// Bytes of a message's header: request, flags, size.
const HEADER_SIZE: u64 = 12;
/// How often to look for the rest of a header: `poll` says that there is something, not that there is more.
const HEADER_INTERVAL: Duration = Duration::from_millis(10);

/// The vhost-user side of one volume.
///
/// The workers outlive connections and end with the server; drop it while the healer still answers, since
/// requests that wait there must come back first.
pub struct Server {
    listener: Option<UnixListener>,
    device: Arc<BlkDevice>,
    crew: Arc<Crew>,
}

impl Server {
    /// Start the workers, one for each port. Without a listener only [`Server::serve`] is of use.
    ///
    /// # Errors
    /// When a thread or its reactor cannot be made.
    ///
    /// # Panics
    /// If there is no port.
    pub fn new(listener: Option<UnixListener>, device: Arc<BlkDevice>, ports: Vec<WorkerPort>) -> io::Result<Server> {
        assert!(!ports.is_empty(), "a server has at least one worker");
        let crew = Arc::new(Crew::new(device.clone(), ports.len(), ports, None)?);
        Ok(Server { listener, device, crew })
    }

    /// The same for a volume that can change hands: `count` workers serve it while it is here.
    ///
    /// # Errors
    /// As [`Server::new`].
    pub fn holding(
        listener: Option<UnixListener>,
        device: Arc<BlkDevice>,
        count: usize,
        volume: Arc<HeldVolume>,
    ) -> io::Result<Server> {
        let crew = Arc::new(Crew::new(device.clone(), count, volume.ports(), Some(volume))?);
        Ok(Server { listener, device, crew })
    }

    /// Queues on offer.
    pub fn num_queues(&self) -> u16 {
        self.device.queues()
    }

    /// What the server is doing, for others to read.
    pub fn status(&self) -> Arc<ServerStatus> {
        self.crew.status()
    }

    /// Accept front-ends until `shutdown` (an eventfd or the like) becomes readable.
    ///
    /// # Errors
    /// When the listener fails.
    pub fn run(&self, shutdown: BorrowedFd<'_>) -> io::Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        listener.set_nonblocking(true)?;
        while wait_for(listener.as_fd(), shutdown)? {
            match listener.accept() {
                Ok((stream, _)) => self.serve(stream, shutdown)?,
                // The client has gone again, or the process is out of something for the moment.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if is_passing(&error) => {
                    log::warn!("a front-end cannot be accepted: {error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Serve one front-end until it leaves or `shutdown` becomes readable; then every queue is stopped and the
    /// device has returned everything.
    ///
    /// # Errors
    /// When waiting fails.
    pub fn serve(&self, stream: UnixStream, shutdown: BorrowedFd<'_>) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
        stream.set_write_timeout(Some(MESSAGE_TIMEOUT))?;
        let session = Session::new(self.device.clone(), self.crew.clone(), self.num_queues());
        let session = Arc::new(Mutex::new(session));
        let status = self.status();
        let socket = stream.try_clone()?;
        let mut handler = BackendReqHandler::from_stream(stream, session.clone());
        status.set_connected(true);
        log::info!("a front-end connected");
        let result = self.converse(&mut handler, &socket, shutdown);
        session.lock().unwrap_or_else(PoisonError::into_inner).close();
        self.device.channel().close();
        status.set_connected(false);
        result
    }

    /// Handle messages until the connection ends.
    fn converse(
        &self,
        handler: &mut BackendReqHandler<Mutex<Session>>,
        socket: &UnixStream,
        shutdown: BorrowedFd<'_>,
    ) -> io::Result<()> {
        while let Some(message) = self.next_message(socket, shutdown)? {
            if message == Message::Cut {
                log::warn!("the connection is closed: no more than the start of a header came in {MESSAGE_TIMEOUT:?}");
                break;
            }
            let channel = channel::peek(socket);
            match self.crew.status().handling(|| handler.handle_request()) {
                Ok(()) => channel.into_iter().for_each(|channel| self.device.channel().open(channel)),
                Err(error) if is_refusal(&error) => log::warn!("the front-end was refused: {error}"),
                Err(Error::Disconnected) => {
                    log::info!("the front-end disconnected");
                    break;
                }
                Err(error) => {
                    log::warn!("the connection is closed: {error}");
                    break;
                }
            }
        }
        Ok(())
    }

    /// The next message. A front-end that can be told of a change has its own words ended first: QEMU 7.2 takes ours
    /// in the middle of them, and then the answers for each other's.
    fn next_message(&self, socket: &UnixStream, shutdown: BorrowedFd<'_>) -> io::Result<Option<Message>> {
        while self.device.channel().is_due() {
            match wait_until(socket.as_fd(), PollFlags::IN, shutdown, Some(QUIET))? {
                Some(true) => break,
                Some(false) => return Ok(None),
                None => self.device.channel().tell(),
            }
        }
        next_message(socket, shutdown)
    }
}

/// What has come of a message.
#[derive(PartialEq, Eq)]
enum Message {
    /// A header at least, or all that will ever come.
    Whole,
    /// Less than a header, for [`MESSAGE_TIMEOUT`].
    Cut,
}

/// Wait for a message that can be handled: the crate reads headers and writes answers for as long as that takes,
/// whatever the timeouts of the socket. `None` if `shutdown` is readable.
fn next_message(socket: &UnixStream, shutdown: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    if !wait_for(socket.as_fd(), shutdown)? {
        return Ok(None);
    }
    let mut rest = MESSAGE_TIMEOUT;
    while ioctl_fionread(socket)? < HEADER_SIZE {
        match wait_until(socket.as_fd(), PollFlags::RDHUP, shutdown, Some(HEADER_INTERVAL))? {
            Some(true) => return Ok(Some(Message::Whole)),
            Some(false) => return Ok(None),
            None if rest.is_zero() => return Ok(Some(Message::Cut)),
            None => rest = rest.saturating_sub(HEADER_INTERVAL),
        }
    }
    // A socket is writable while most of its buffer is free, which is more than the longest answer.
    let room = wait_until(socket.as_fd(), PollFlags::OUT, shutdown, None)?;
    Ok((room == Some(true)).then_some(Message::Whole))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsRawFd, OwnedFd, RawFd};

    use rustix::event::{EventfdFlags, eventfd};
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;
    use crate::vhost::testing::{Bench, DATA, Guest, chain_of, readable, writable};

    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_OWNER: u32 = 3;
    const SET_VRING_NUM: u32 = 8;
    const SET_VRING_ADDR: u32 = 9;
    const SET_VRING_BASE: u32 = 10;
    const GET_VRING_BASE: u32 = 11;
    const SET_VRING_KICK: u32 = 12;
    const SET_VRING_CALL: u32 = 13;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    const GET_QUEUE_NUM: u32 = 17;
    const SET_VRING_ENABLE: u32 = 18;
    const GET_CONFIG: u32 = 24;
    const SET_CONFIG: u32 = 25;
    const GET_INFLIGHT_FD: u32 = 31;
    const SET_INFLIGHT_FD: u32 = 32;
    const RESET_DEVICE: u32 = 34;
    const ADD_MEM_REG: u32 = 37;
    const REM_MEM_REG: u32 = 38;

    /// A front-end written out by hand: every message asks for an answer.
    struct FrontEnd {
        socket: UnixStream,
        kick: OwnedFd,
        call: OwnedFd,
        inflight: Option<(Vec<u8>, File)>,
    }

    fn words(numbers: &[u64]) -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
    }

    /// Two 32-bit numbers, as most messages about a queue have.
    fn state(index: u32, value: u32) -> Vec<u8> {
        [index.to_le_bytes(), value.to_le_bytes()].concat()
    }

    impl FrontEnd {
        fn connect(path: &std::path::Path) -> FrontEnd {
            let socket = UnixStream::connect(path).unwrap();
            // A test that waits for an answer that never comes fails instead.
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            FrontEnd { socket, kick: event(), call: event(), inflight: None }
        }

        fn send(&self, request: u32, payload: &[u8], fds: &[RawFd]) {
            let len = u32::try_from(payload.len()).unwrap();
            let header = [request.to_le_bytes(), 9_u32.to_le_bytes(), len.to_le_bytes()].concat();
            let message: &[&[u8]] = &[&header, payload];
            self.socket.send_with_fds(message, fds).unwrap();
        }

        fn receive(&mut self) -> (Vec<u8>, Option<File>) {
            let mut header = [0; 12];
            let (n, file) = self.socket.recv_with_fd(&mut header).unwrap();
            assert_eq!(n, 12, "the connection was closed");
            assert_eq!(header[4], 5, "an answer has version 1 and the reply flag");
            let mut payload = vec![0; usize::try_from(u32::from_le_bytes(header[8..].try_into().unwrap())).unwrap()];
            self.socket.read_exact(&mut payload).unwrap();
            (payload, file)
        }

        fn get(&mut self, request: u32, payload: &[u8]) -> Vec<u8> {
            self.send(request, payload, &[]);
            self.receive().0
        }

        fn order(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> bool {
            self.send(request, payload, fds);
            self.receive().0 == words(&[0])
        }

        fn set(&mut self, request: u32, payload: &[u8]) {
            assert!(self.order(request, payload, &[]), "message {request} was refused");
        }

        /// What QEMU and cloud-hypervisor do: on a new connection, and on a later one without asking again.
        fn set_up(&mut self, guest: &Guest, base: u32) {
            self.send(SET_OWNER, &[], &[]);
            let offered = u64::from_le_bytes(self.get(GET_FEATURES, &[]).try_into().unwrap());
            self.send(SET_PROTOCOL_FEATURES, &words(&[0xb209]), &[]);
            assert_eq!(self.receive().0, words(&[0]));
            for index in 0..64 {
                assert!(self.order(SET_VRING_CALL, &words(&[index]), &[self.call.as_raw_fd()]), "before features");
            }
            // Its ring is a split one.
            self.set(SET_FEATURES, &words(&[offered & !(1 << 34)]));
            let end = guest.first_region_end();
            for start in [0, end] {
                let region = words(&[0, start, end, start, start]);
                assert!(self.order(ADD_MEM_REG, &region, &[guest.file.as_raw_fd()]));
            }
            let mut asked = [words(&[0, 0]), vec![0; 8]].concat();
            asked[16] = 1;
            asked[18] = u8::try_from(guest.size).unwrap();
            if self.inflight.is_none() {
                self.send(GET_INFLIGHT_FD, &asked, &[]);
                let (answer, file) = self.receive();
                assert_eq!(answer[16..20], asked[16..20], "as many queues and entries as asked for");
                self.inflight = Some((answer, file.unwrap()));
            }
            let (layout, fd) = self.inflight.as_ref().map(|(layout, file)| (layout.clone(), file.as_raw_fd())).unwrap();
            assert!(self.order(SET_INFLIGHT_FD, &layout, &[fd]));
            self.set(SET_VRING_NUM, &state(0, u32::from(guest.size)));
            self.set(SET_VRING_BASE, &state(0, base));
            let ring = guest.addresses();
            self.set(SET_VRING_ADDR, &words(&[0, ring.descriptors, ring.used, ring.avail, 0]));
            assert!(self.order(SET_VRING_KICK, &words(&[0]), &[self.kick.as_raw_fd()]));
            for index in 0..64 {
                self.set(SET_VRING_ENABLE, &state(index, 1));
            }
        }

        /// Offer a read of sector 0, and expect it to be served and notified.
        fn read_sector(&self, guest: &Guest) {
            guest.write(DATA, &[0; 16]);
            let head = chain_of(guest, &[readable(DATA, 16), writable(DATA + 0x1000, 512), writable(DATA + 64, 1)]);
            guest.offer(head);
            rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            while guest.used_idx() != guest.avail_idx() {
                assert!(std::time::Instant::now() < deadline, "the request was not served");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(guest.take_used(), Some((0, 513)));
        }
    }

    fn check(client: impl FnOnce(&std::path::Path, &Guest)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let (device, ports) = Bench::ports(2);
        let server = Server::new(Some(listener), device, ports).unwrap();
        let shutdown = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| server.run(shutdown.as_fd()));
            let guest = Guest::new(64);
            let client = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| client(&path, &guest)));
            rustix::io::write(&shutdown, &1_u64.to_ne_bytes()).unwrap();
            running.join().unwrap().unwrap();
            client.unwrap();
        });
        assert!(!server.status().connected());
        assert_eq!(server.status().in_flight(), 0);
    }

    #[test]
    fn front_ends_come_and_go() {
        check(|path, guest| {
            let mut front_end = FrontEnd::connect(path);
            front_end.set_up(guest, 0);
            assert_eq!(front_end.get(GET_QUEUE_NUM, &[]), words(&[64]));
            front_end.read_sector(guest);
            front_end.read_sector(guest);
            // Gone without a word; the next one passes the used index, and knows nothing but the region.
            let inflight = front_end.inflight.take();
            drop(front_end);
            let mut front_end = FrontEnd::connect(path);
            front_end.inflight = inflight;
            front_end.set_up(guest, 2);
            front_end.read_sector(guest);
            assert_eq!(front_end.get(GET_VRING_BASE, &state(0, 0)), state(0, 3));
            assert_eq!(front_end.get(GET_VRING_BASE, &state(1, 0)), state(1, 0));
        });
    }

    #[test]
    fn the_configuration_has_the_length_asked_for() {
        check(|path, guest| {
            let mut front_end = FrontEnd::connect(path);
            front_end.set_up(guest, 0);
            for len in [57_u32, 60, 256] {
                let asked = [0, len, 1].iter().flat_map(|n: &u32| n.to_le_bytes()).collect::<Vec<_>>();
                let asked = [asked, vec![0; usize::try_from(len).unwrap()]].concat();
                let answer = front_end.get(GET_CONFIG, &asked);
                assert_eq!(answer.len(), asked.len());
                assert_eq!(answer[12..20], 4096_u64.to_le_bytes());
            }
            for flags in [0_u32, 1] {
                let set = [32_u32, 1, flags].iter().flat_map(|n| n.to_le_bytes()).chain([0]).collect::<Vec<_>>();
                front_end.set(SET_CONFIG, &set);
            }
            let set = [0_u32, 1, 0].iter().flat_map(|n| n.to_le_bytes()).chain([0]).collect::<Vec<_>>();
            assert!(!front_end.order(SET_CONFIG, &set, &[]), "the capacity is not the driver's to set");
            front_end.read_sector(guest);
        });
    }

    /// QEMU says nothing of the cache mode to a back-end that came back.
    #[test]
    fn write_through_outlives_the_process() {
        let config = |offset: u32, len: u32, bytes: &[u8]| {
            [&[offset, len, 0].iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>(), bytes].concat()
        };
        let mut region = None;
        for (before, after) in [(1, 0), (0, 0), (0, 1), (1, 1)] {
            check(|path, guest| {
                let mut front_end = FrontEnd::connect(path);
                front_end.inflight = region.take();
                front_end.set_up(guest, 0);
                assert_eq!(front_end.get(GET_CONFIG, &config(32, 1, &[0]))[12], before);
                front_end.set(SET_CONFIG, &config(32, 1, &[after]));
                front_end.read_sector(guest);
                region = front_end.inflight.take();
            });
            // The next guest has used nothing.
            region = region.take().map(|(layout, file)| {
                rustix::io::pwrite(&file, &0_u16.to_le_bytes(), 14).unwrap();
                (layout, file)
            });
        }
    }

    #[test]
    fn refusals_leave_the_connection_open() {
        check(|path, guest| {
            let mut front_end = FrontEnd::connect(path);
            front_end.set_up(guest, 0);
            assert!(!front_end.order(SET_FEATURES, &words(&[1 << 63]), &[]));
            let packed = front_end.get(GET_FEATURES, &[]);
            assert!(!front_end.order(SET_FEATURES, &packed, &[]), "a started ring stays split");
            assert!(!front_end.order(SET_VRING_NUM, &state(1, 100), &[]));
            assert!(!front_end.order(SET_VRING_NUM, &state(64, 128), &[]));
            assert!(!front_end.order(SET_VRING_BASE, &state(0, 9), &[]), "a started queue keeps its place");
            assert!(!front_end.order(REM_MEM_REG, &words(&[0, 1, 2, 3, 4]), &[]));
            let beyond = words(&[0, 1 << 40, 1 << 30, 1 << 40, 0]);
            assert!(!front_end.order(ADD_MEM_REG, &beyond, &[guest.file.as_raw_fd()]), "beyond the file");
            front_end.read_sector(guest);
        });
    }

    #[test]
    fn a_kick_that_nobody_can_wait_for_is_refused() {
        check(|path, guest| {
            let mut front_end = FrontEnd::connect(path);
            front_end.set_up(guest, 0);
            let null = File::open("/dev/null").unwrap();
            for fd in [guest.file.as_raw_fd(), null.as_raw_fd()] {
                for queue in [0, 1] {
                    assert!(!front_end.order(SET_VRING_KICK, &words(&[queue]), &[fd]));
                }
            }
            front_end.read_sector(guest);
        });
    }

    #[test]
    fn kicks_rings_and_memory_change_under_a_live_queue() {
        check(|path, guest| {
            let mut front_end = FrontEnd::connect(path);
            front_end.set_up(guest, 0);
            front_end.kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
            assert!(front_end.order(SET_VRING_KICK, &words(&[0]), &[front_end.kick.as_raw_fd()]));
            front_end.read_sector(guest);
            // No call, then no kick: bit 8 says that there is no descriptor.
            front_end.set(SET_VRING_CALL, &words(&[0x100]));
            front_end.read_sector(guest);
            front_end.set(SET_VRING_KICK, &words(&[0x100]));
            front_end.read_sector(guest);
            let ring = guest.addresses();
            front_end.set(SET_VRING_ADDR, &words(&[0, ring.descriptors, ring.used, ring.avail, 0]));
            let end = guest.first_region_end();
            let second = words(&[0, end, end, end, end]);
            front_end.set(REM_MEM_REG, &second);
            front_end.read_sector(guest);
            // The ring's own memory goes and comes back.
            let first = words(&[0, 0, end, 0, 0]);
            front_end.set(REM_MEM_REG, &first);
            assert!(front_end.order(ADD_MEM_REG, &first, &[guest.file.as_raw_fd()]));
            front_end.read_sector(guest);
            front_end.set(RESET_DEVICE, &[]);
            assert_eq!(front_end.get(GET_VRING_BASE, &state(0, 0)), state(0, 0));
        });
    }
}
