//! Serving one volume: devices, healer, workers, front-end socket and control socket put together, and
//! taken apart again in the order that loses nothing.

use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::control::server::{self as control, ServedVolume as ControlledVolume};
use crate::control::socket::{BindError, SocketFile, bind_unix, check_unix};
use crate::runtime::handle::{FrontEndState, VolumeHandle};
use crate::runtime::options::{Cache, Listen, ServeOptions, Transport};
use crate::runtime::volume::{MakeError, open_volume};
use crate::runtime::worker::WorkerPort;
use crate::vhost::device::BlkDevice;
use crate::vhost::framework;
use crate::vhost::server::Server;
use crate::vhost::status::ServerStatus;

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
    #[error("--fd {fd}: {error}; pass a Unix socket, listening or connected")]
    Fd {
        /// Its number.
        fd: RawFd,
        /// The reason.
        error: io::Error,
    },
    /// An inherited descriptor is of no use for the framework's daemon, which accepts for itself.
    #[error("--fd {0}: is a connected socket; --transport framework takes a listening one")]
    FdConnected(RawFd),
    /// The host refused a thread or a descriptor.
    #[error("the front-end socket: {0}")]
    Host(#[from] io::Error),
}

/// Where front-ends come from.
enum FrontEnd {
    Listener(UnixListener),
    Connected(UnixStream),
}

/// Where front-ends will come from once there is a volume.
enum FrontEndSocket<'a> {
    /// Nothing is in the way there.
    Checked(&'a Path),
    Inherited(FrontEnd),
}

impl FrontEndSocket<'_> {
    fn listen(self) -> Result<(FrontEnd, Option<SocketFile>), BindError> {
        match self {
            FrontEndSocket::Checked(path) => {
                let (listener, file) = bind_unix(path)?;
                Ok((FrontEnd::Listener(listener), Some(file)))
            }
            FrontEndSocket::Inherited(front_end) => Ok((front_end, None)),
        }
    }
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
        front_end: FrontEnd,
        device: BlkDevice,
        ports: Vec<WorkerPort>,
    ) -> io::Result<Serving> {
        let device = Arc::new(device);
        Ok(match (transport, front_end) {
            (Transport::Framework, FrontEnd::Listener(listener)) => {
                Serving::Framework(framework::Server::new(listener, device, ports)?)
            }
            (_, FrontEnd::Listener(listener)) => Serving::Own(Server::new(Some(listener), device, ports)?, None),
            (_, FrontEnd::Connected(stream)) => Serving::Own(Server::new(None, device, ports)?, Some(stream)),
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
pub fn serve(options: &ServeOptions, stop: OwnedFd) -> Result<(), ServeError> {
    // Sockets first: what they refuse costs nothing, and opening a volume for writing changes it. But there is
    // nothing to connect to before the volume is open: QEMU's guest stands still until a server has answered,
    // and QEMU 7.2, for one, never connects again when the server ends instead (the volume does not open).
    let socket = check_front_end(options)?;
    let control = options.control_path.as_ref().map(|path| bind_unix(path)).transpose()?;
    if options.cache == Cache::Writeback {
        log::warn!(
            "{}: --cache writeback: write errors are only seen at flush, when the data is gone; for throwaway disks",
            options.primary.display()
        );
    }
    let workers = workers(options);
    let mut volume = open_volume(options, workers)?;
    let (front_end, _front_end_file) = match socket.listen() {
        Ok(front_end) => front_end,
        Err(error) => {
            volume.close()?;
            return Err(error.into());
        }
    };
    let handle = volume.handle();
    let device = BlkDevice::new(volume.disk(), options.num_queues);
    let mut server = Serving::start(options.transport, front_end, device, volume.take_ports())?;
    let (status, clock) = (server.status(), handle.clock());
    handle.set_front_end(move || FrontEndState {
        connected: status.connected(),
        oldest_in_flight_ms: status.oldest_in_flight_ms(clock.now()),
        malformed_requests: status.malformed(),
    });
    let (control, _control_file) = start_control(control, options, &handle)?;
    announce(options, &handle);
    let served = server.run(&stop);
    // The workers first: what they still wait for comes from the healer.
    drop(server);
    drop(control);
    volume.close()?;
    Ok(served?)
}

/// Refuse what can be refused at once.
fn check_front_end(options: &ServeOptions) -> Result<FrontEndSocket<'_>, ServeError> {
    match &options.listen {
        Listen::Path(path) => {
            check_unix(path)?;
            Ok(FrontEndSocket::Checked(path))
        }
        Listen::Fd(fd) => {
            let failed = |error: rustix::io::Errno| ServeError::Fd { fd: *fd, error: error.into() };
            // SAFETY: the operator hands over this descriptor by its number; nobody else in this process uses it.
            let socket = unsafe { OwnedFd::from_raw_fd(*fd) };
            let listening = rustix::net::sockopt::socket_acceptconn(&socket).map_err(failed)?;
            rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
            if !listening && options.transport == Transport::Framework {
                return Err(ServeError::FdConnected(*fd));
            }
            Ok(FrontEndSocket::Inherited(if listening {
                FrontEnd::Listener(socket.into())
            } else {
                FrontEnd::Connected(socket.into())
            }))
        }
    }
}

fn workers(options: &ServeOptions) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    u32::from(options.workers.unwrap_or(cores).min(options.num_queues).max(1))
}

type Control = (Option<control::Server>, Option<SocketFile>);

fn start_control(
    bound: Option<(UnixListener, SocketFile)>,
    options: &ServeOptions,
    handle: &VolumeHandle,
) -> Result<Control, ServeError> {
    let Some((listener, file)) = bound else { return Ok((None, None)) };
    let name = options.primary.file_name().map_or_else(PathBuf::new, PathBuf::from).display().to_string();
    let volume = ControlledVolume { name, uuid: handle.uuid(), volume: Arc::new(handle.clone()) };
    Ok((Some(control::Server::start(listener, vec![volume])?), Some(file)))
}

/// One line with what is true of this server.
fn announce(options: &ServeOptions, handle: &VolumeHandle) {
    let status = handle.status();
    let listen = match &options.listen {
        Listen::Path(path) => path.display().to_string(),
        Listen::Fd(fd) => format!("descriptor {fd}"),
    };
    let format = if options.passthrough { "passthrough".to_owned() } else { "format 1, scanning off".to_owned() };
    let mode = if status.state.iter().any(|state| state != "ok") {
        format!(", state {}", status.state.join(" "))
    } else {
        String::new()
    };
    // Whoever started the server may have closed its output; that is no reason not to serve.
    let _ = writeln!(
        io::stdout(),
        "vhost-remap {}: {}: {} MiB, {format}, remaps {}/{}, {}, {} workers, {} transport, listening on {listen}{mode}",
        status.version,
        options.primary.display(),
        status.capacity_sectors / 2048,
        status.blocks.remapped,
        status.blocks.remaps_max,
        status.io_engine,
        status.workers,
        status.transport,
    );
}
