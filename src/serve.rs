//! Serving one volume: devices, healer, workers, front-end socket and control socket put together, and
//! taken apart again in the order that loses nothing.

use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::control::server::{self as control, ServedVolume as ControlledVolume};
use crate::control::socket::{BindError, SocketFile, bind_unix};
use crate::runtime::handle::{FrontEndState, VolumeHandle};
use crate::runtime::options::{Cache, Listen, ServeOptions};
use crate::runtime::volume::{MakeError, open_volume};
use crate::vhost::device::BlkDevice;
use crate::vhost::server::Server;

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
    /// One path for two sockets.
    #[error("{}: is the front-end's socket too; choose another --control-path", .0.display())]
    SameSocket(PathBuf),
    /// The host refused a thread or a descriptor.
    #[error("the front-end socket: {0}")]
    Host(#[from] io::Error),
}

/// Where front-ends come from: a socket of ours, or an inherited one.
pub struct FrontEnd {
    socket: FrontEndSocket,
    file: Option<SocketFile>,
}

enum FrontEndSocket {
    Listener(UnixListener),
    Connected(UnixStream),
}

impl FrontEnd {
    /// Make the socket, or take over the inherited one. To be called before the program opens anything: a
    /// descriptor of our own would pass for an inherited one.
    ///
    /// # Errors
    /// When there can be no socket at the path, or there is none of that number.
    pub fn new(listen: &Listen) -> Result<FrontEnd, ServeError> {
        match listen {
            Listen::Path(path) => {
                let (listener, file) = bind_unix(path)?;
                Ok(FrontEnd { socket: FrontEndSocket::Listener(listener), file: Some(file) })
            }
            Listen::Fd(fd) => {
                let socket = inherit(*fd).map_err(|error| ServeError::Fd { fd: *fd, error })?;
                Ok(FrontEnd { socket, file: None })
            }
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

/// Serve until `stop` becomes readable.
///
/// # Errors
/// When a device or socket cannot be opened, or the volume does not close cleanly.
pub fn serve(options: &ServeOptions, front_end: FrontEnd, stop: OwnedFd) -> Result<(), ServeError> {
    // Sockets first: what they refuse costs nothing, and opening a volume for writing changes it.
    let FrontEnd { socket, file: front_end_file } = front_end;
    if let (Some(path), Some(file)) = (&options.control_path, &front_end_file)
        && file.is_at(path)
    {
        return Err(ServeError::SameSocket(path.clone()));
    }
    let control = options.control_path.as_ref().map(|path| bind_unix(path)).transpose()?;
    if options.cache == Cache::Writeback {
        log::warn!(
            "{}: --cache writeback: write errors are only seen at flush, when the data is gone; for throwaway disks",
            options.primary.display()
        );
    }
    let workers = workers(options);
    let mut volume = open_volume(options, workers)?;
    let handle = volume.handle();
    let device = Arc::new(BlkDevice::new(volume.disk(), options.num_queues));
    let (listener, connected) = match socket {
        FrontEndSocket::Listener(listener) => (Some(listener), None),
        FrontEndSocket::Connected(stream) => (None, Some(stream)),
    };
    let server = Server::new(listener, device, volume.take_ports())?;
    let (status, clock) = (server.status(), handle.clock());
    handle.set_front_end(move || FrontEndState {
        connected: status.connected(),
        oldest_in_flight_ms: status.oldest_in_flight_ms(clock.now()),
        malformed_requests: status.malformed(),
    });
    let (control, _control_file) = start_control(control, options, &handle)?;
    announce(options, &handle);
    let served = match connected {
        Some(stream) => server.serve(stream, stop.as_fd()),
        None => server.run(stop.as_fd()),
    };
    // The workers first: what they still wait for comes from the healer.
    drop(server);
    drop(control);
    volume.close()?;
    Ok(served?)
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
        "vhost-remap {}: {}: {} MiB, {format}, remaps {}/{}, {}, {} workers, listening on {listen}{mode}",
        status.version,
        options.primary.display(),
        status.capacity_sectors / 2048,
        status.blocks.remapped,
        status.blocks.remaps_max,
        status.io_engine,
        status.workers,
    );
}
