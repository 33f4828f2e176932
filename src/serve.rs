//! Serving one volume: devices, healer, workers, front-end socket and control socket put together, and
//! taken apart again in the order that loses nothing.

mod watchdog;

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::control::access::{GroupError, let_in};
use crate::control::server::{self as control, Doors, ServedVolume as ControlledVolume};
use crate::control::socket::{BindError, SocketFile, bind_unix, check_unix, is_same_place};
use crate::runtime::handle::FrontEndState;
use crate::runtime::handover::HeldVolume;
use crate::runtime::options::{Cache, Listen, ServeOptions, Transport};
use crate::runtime::volume::MakeError;
use crate::vhost::device::BlkDevice;
use crate::vhost::framework;
use crate::vhost::server::Server;
use crate::vhost::status::ServerStatus;
use watchdog::Watchdog;

/// Why serving did not start, or ended: one line that names the device, the number and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The volume does not open or close.
    #[error(transparent)]
    Volume(#[from] MakeError),
    /// A socket cannot be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An inherited descriptor is not a socket.
    #[error("--fd {fd}: {error}; pass an open Unix stream socket, listening or connected")]
    Fd {
        /// Its number.
        fd: RawFd,
        /// The reason.
        error: io::Error,
    },
    /// An inherited descriptor is of no use for the framework's daemon, which accepts for itself.
    #[error("--fd {0}: is a connected socket; --transport framework takes a listening one")]
    FdConnected(RawFd),
    /// The framework's daemon has its workers from the start.
    #[error("--transport framework: takes no incoming guest; leave --incoming out")]
    FrameworkIncoming,
    /// One path for two sockets.
    #[error("{}: is the front-end's socket too; choose another --control-path", .0.display())]
    SameSocket(PathBuf),
    /// A group cannot be let in.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// No port.
    #[error("--http-listen {address}: {error}; choose another port, or an address of this machine")]
    Http {
        /// Where.
        address: SocketAddr,
        /// The reason.
        error: io::Error,
    },
    /// The host refused a thread or a descriptor.
    #[error("the front-end socket: {0}")]
    Host(#[from] io::Error),
    /// Serving failed, and then the volume did not close.
    #[error("{0}; and then {1}")]
    NotClosed(Box<ServeError>, MakeError),
}

/// Where front-ends come from: a socket that is made once there is a volume, or an inherited one.
pub struct FrontEnd(FrontEndSocket);

enum FrontEndSocket {
    /// Nothing is in the way there.
    Checked(PathBuf),
    Listener(UnixListener),
    Connected(UnixStream),
}

impl FrontEnd {
    /// See that a socket can be made, or take over the inherited one. To be called before the program opens
    /// anything: a descriptor of our own would pass for an inherited one.
    ///
    /// # Errors
    /// When there can be no socket at the path, or there is none of that number.
    pub fn new(listen: &Listen) -> Result<FrontEnd, ServeError> {
        match listen {
            Listen::Path(path) => {
                check_unix(path)?;
                Ok(FrontEnd(FrontEndSocket::Checked(path.clone())))
            }
            Listen::Fd(fd) => Ok(FrontEnd(inherit(*fd).map_err(|error| ServeError::Fd { fd: *fd, error })?)),
        }
    }

    /// Make the socket that was checked.
    fn listen(self) -> Result<(FrontEndSocket, Option<SocketFile>), BindError> {
        match self.0 {
            FrontEndSocket::Checked(path) => {
                let (listener, file) = bind_unix(&path)?;
                Ok((FrontEndSocket::Listener(listener), Some(file)))
            }
            inherited => Ok((inherited, None)),
        }
    }
}

fn inherit(fd: RawFd) -> io::Result<FrontEndSocket> {
    // SAFETY: no memory is passed.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, the operator hands it over by its number, and nothing of ours is open yet.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let kind = (sockopt::socket_domain(&socket)?, sockopt::socket_type(&socket)?);
    if kind != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(io::Error::other("a socket of another kind"));
    }
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    let listening = sockopt::socket_acceptconn(&socket)?;
    Ok(if listening { FrontEndSocket::Listener(socket.into()) } else { FrontEndSocket::Connected(socket.into()) })
}

/// What serves front-ends.
enum Serving {
    /// A listener, or one front-end that is connected already.
    Own(Server, Option<UnixStream>),
    Framework(framework::Server),
}

impl Serving {
    fn start(
        transport: Transport,
        front_end: FrontEndSocket,
        device: Arc<BlkDevice>,
        workers: u32,
        volume: &Arc<HeldVolume>,
    ) -> io::Result<Serving> {
        let own = |listener| {
            let workers = usize::try_from(workers).expect("at most 64");
            Server::holding(listener, device.clone(), workers, volume.clone())
        };
        Ok(match (transport, front_end) {
            (Transport::Framework, FrontEndSocket::Listener(listener)) => {
                Serving::Framework(framework::Server::new(listener, device, volume.ports())?)
            }
            (_, FrontEndSocket::Listener(listener)) => Serving::Own(own(Some(listener))?, None),
            (_, FrontEndSocket::Connected(stream)) => Serving::Own(own(None)?, Some(stream)),
            (_, FrontEndSocket::Checked(_)) => unreachable!("listened at by now"),
        })
    }

    fn status(&self) -> Arc<ServerStatus> {
        match self {
            Serving::Own(server, _) => server.status(),
            Serving::Framework(server) => server.status(),
        }
    }

    /// Until `stop` becomes readable or, where there is no listener, the front-end leaves.
    fn run(&mut self, stop: &OwnedFd) -> io::Result<()> {
        match self {
            Serving::Own(server, connected) => match connected.take() {
                Some(stream) => server.serve(stream, stop.as_fd()),
                None => server.run(stop.as_fd()),
            },
            Serving::Framework(server) => server.run(stop.as_fd()),
        }
    }
}

/// Serve until `stop` becomes readable.
///
/// # Errors
/// When a device or socket cannot be opened, or the volume does not close cleanly.
pub fn serve(options: &ServeOptions, front_end: FrontEnd, stop: OwnedFd) -> Result<(), ServeError> {
    // A look at the sockets first: what they refuse costs nothing, and opening a volume for writing changes it. But
    // none is made or replaced before the volume is open: QEMU's guest stands still until a server has answered,
    // and QEMU 7.2, for one, never connects again when the server ends instead (the volume does not open).
    if let (Listen::Fd(fd), FrontEndSocket::Connected(_), Transport::Framework) =
        (&options.listen, &front_end.0, options.transport)
    {
        return Err(ServeError::FdConnected(*fd));
    }
    if options.incoming && options.transport == Transport::Framework {
        return Err(ServeError::FrameworkIncoming);
    }
    if let Some(control) = &options.control_path {
        check_unix(control)?;
        if let FrontEndSocket::Checked(path) = &front_end.0
            && is_same_place(path, control)
        {
            return Err(ServeError::SameSocket(control.clone()));
        }
    }
    if options.cache == Cache::Writeback {
        log::warn!(
            "{}: --cache writeback: write errors are only seen at flush, when the data is gone; for throwaway disks",
            options.primary.display()
        );
    }
    let open = if options.incoming { HeldVolume::incoming } else { HeldVolume::open };
    let volume = Arc::new(open(options, workers(options))?);
    let device = Arc::new(BlkDevice::new(volume.disk(), options.num_queues));
    let mut watchdog = None;
    let served = serve_volume(options, &volume, &device, front_end, &stop, &mut watchdog);
    match (served, volume.give(!device.is_writeback())) {
        (served, Ok(())) => served,
        (Ok(()), Err(error)) => Err(error.into()),
        (Err(first), Err(error)) => Err(ServeError::NotClosed(Box::new(first), error)),
    }
}

/// Serve a volume, until `stop` becomes readable. Whatever comes of it, it is left to be closed.
fn serve_volume(
    options: &ServeOptions,
    volume: &Arc<HeldVolume>,
    device: &Arc<BlkDevice>,
    front_end: FrontEnd,
    stop: &OwnedFd,
    watchdog: &mut Option<Watchdog>,
) -> Result<(), ServeError> {
    let control = options.control_path.as_ref().map(|path| bind_unix(path)).transpose()?;
    if let (Some((_, file)), Some(group)) = (&control, &options.control_group) {
        let_in(file.path(), group)?;
    }
    let http = options.http_listen.map(listen_http).transpose()?;
    let (front_end, _front_end_file) = front_end.listen()?;
    let mut server = Serving::start(options.transport, front_end, device.clone(), workers(options), volume)?;
    let announcer = device.clone();
    volume.set_announce(move || announcer.announce());
    let (status, clock) = (server.status(), volume.clock());
    volume.set_front_end(move || FrontEndState {
        connected: status.connected(),
        oldest_in_flight_ms: status.oldest_in_flight_ms(clock.now()),
        malformed_requests: status.malformed(),
    });
    let (control, _control_file) = start_control(control, http, options, volume)?;
    announce(options, volume);
    let watchdog = watchdog.insert(Watchdog::start(volume.clone(), server.status())?);
    let served = server.run(stop);
    watchdog.closing();
    // The workers first: what they still wait for comes from the healer.
    drop(server);
    drop(control);
    Ok(served?)
}

fn workers(options: &ServeOptions) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    u32::from(options.workers.unwrap_or(cores).min(options.num_queues).max(1))
}

type Control = (Option<control::Server>, Option<SocketFile>);

fn start_control(
    bound: Option<(UnixListener, SocketFile)>,
    http: Option<TcpListener>,
    options: &ServeOptions,
    volume: &Arc<HeldVolume>,
) -> Result<Control, ServeError> {
    let (control, file) = bound.unzip();
    if control.is_none() && http.is_none() {
        return Ok((None, None));
    }
    let name = options.primary.file_name().map_or_else(PathBuf::new, PathBuf::from).display().to_string();
    let volume = ControlledVolume { name, uuid: volume.set().to_string(), volume: volume.clone() };
    let doors = Doors { control, readers: options.control_group.clone(), http };
    Ok((Some(control::Server::start_at(doors, vec![volume])?), file))
}

fn listen_http(address: SocketAddr) -> Result<TcpListener, ServeError> {
    let failed = |error| ServeError::Http { address, error };
    let listener = TcpListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    if !bound.ip().is_loopback() {
        log::warn!("--http-listen {bound}: whoever reaches this address reads all reports, without a password");
    }
    log::info!("reports at http://{bound}/metrics");
    Ok(listener)
}

/// One line with what is true of this server.
fn announce(options: &ServeOptions, volume: &HeldVolume) {
    let status = volume.status();
    let listen = match &options.listen {
        Listen::Path(path) => path.display().to_string(),
        Listen::Fd(fd) => format!("descriptor {fd}"),
    };
    let format = if options.passthrough { "passthrough" } else { "format 1" };
    let scanning = if options.scan_interval().is_some() { "on" } else { "off" };
    let mode = if status.state.iter().any(|state| state != "ok") {
        format!(", state {}", status.state.join(" "))
    } else {
        String::new()
    };
    let remaps = if options.incoming {
        format!("a guest is awaited, remaps at most {}", status.blocks.remaps_max)
    } else {
        format!("remaps {}/{}", status.blocks.remapped, status.blocks.remaps_max)
    };
    // Whoever started the server may have closed its output; that is no reason not to serve.
    let _ = writeln!(
        io::stdout(),
        "vhost-remap {}: {}: {} MiB, {format}, scanning {scanning}, {remaps}, {}, {} workers, {} transport, listening on {listen}{mode}",
        status.version,
        options.primary.display(),
        status.capacity_sectors / 2048,
        status.io_engine,
        status.workers,
        status.transport,
    );
}
