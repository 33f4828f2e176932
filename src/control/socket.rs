//! Socket files: made where nobody else serves, removed when still ours.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, Mode, access, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

use super::client::permission_advice;

/// `sun_path` has 108 bytes, the last of them zero (unix(7)).
pub const PATH_MAX_BYTES: usize = 107;

/// Connections the kernel keeps until they are accepted. Front-ends and operators come one by one.
const BACKLOG: i32 = 16;

/// The owner and the group may connect; nobody else.
const MODE: u32 = 0o660;

/// Why there is no socket at a path.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("{}: is in use by a running server; choose another path or stop that server", .0.display())]
    InUse(PathBuf),
    /// There is a file that is no socket.
    #[error("{}: exists and is not a socket; choose another path or remove it", .0.display())]
    NotASocket(PathBuf),
    /// The kernel has no room for the path.
    #[error("{}: the path has {bytes} bytes, a Unix socket path at most {PATH_MAX_BYTES}; choose a shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// There is no directory to put it in.
    #[error("{}: there is no directory {}; create it first", path.display(), directory.display())]
    NoDirectory {
        /// The path.
        path: PathBuf,
        /// What is missing, or no directory.
        directory: PathBuf,
    },
    /// Others may write there.
    #[error("{}: permission denied; {advice}", path.display())]
    Permission {
        /// The path.
        path: PathBuf,
        /// Whose the directory is and what to do.
        advice: String,
    },
    /// Nobody may write there.
    #[error("{}: is on a read-only file system; choose another path, such as one under /run", .0.display())]
    ReadOnly(PathBuf),
    /// Something else.
    #[error("{}: cannot {action}: {source}; choose another path", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// A socket file of ours, removed on drop unless somebody else has put another one in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Nothing is lost if it stays: the next server finds it stale and replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether [`bind_unix`] could listen at `path` now. Nothing is changed.
///
/// # Errors
/// See [`BindError`].
pub fn check_unix(path: &Path) -> Result<(), BindError> {
    is_stale(path).map(drop)
}

/// Whether a stale socket is in the way at `path`, where a socket could be.
fn is_stale(path: &Path) -> Result<bool, BindError> {
    let failed = |action, source: io::Error| BindError::Io { path: path.into(), action, source };
    let address = address(path)?;
    let directory = directory_of(path);
    let is_missing = |kind| matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    match fs::metadata(directory) {
        Ok(meta) if meta.is_dir() => {}
        Err(e) if !is_missing(e.kind()) => {}
        _ => return Err(BindError::NoDirectory { path: path.into(), directory: directory.into() }),
    }
    let stale = holds_stale(path, &address)?;
    access(directory, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| match e {
        Errno::ROFS => BindError::ReadOnly(path.into()),
        // What is missing is the right to write into the directory.
        Errno::ACCESS => permission(path, directory),
        e => failed("bind", e.into()),
    })?;
    Ok(stale)
}

/// Listen at `path`. A stale socket there is replaced; anything else there is left alone and refused.
///
/// # Errors
/// See [`BindError`].
pub fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let failed = |action, source: io::Error| BindError::Io { path: path.into(), action, source };
    if is_stale(path)?
        && let Err(e) = fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        return Err(failed("remove the stale socket", e));
    }
    let socket = stream_socket().map_err(|e| failed("make a socket", e.into()))?;
    // Linux gives the file the socket's own mode less the umask, so nobody else can get in before the chmod below.
    fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(|e| failed("set the mode of the socket", e.into()))?;
    bind(&socket, &address(path)?).map_err(|e| match e {
        Errno::ADDRINUSE => BindError::InUse(path.into()),
        e => failed("bind", e.into()),
    })?;
    let identity = identity(path).map_err(|e| failed("look at the new socket", e))?;
    let file = SocketFile { path: path.into(), identity };
    fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(|e| failed("set mode 0660", e))?;
    listen(&socket, BACKLOG).map_err(|e| failed("listen", e.into()))?;
    let listener = UnixListener::from(socket);
    listener.set_nonblocking(false).map_err(|e| failed("make the socket blocking", e))?;
    Ok((listener, file))
}

/// Whether two paths would be one socket, by whatever names of its directory.
pub fn is_same_place(one: &Path, other: &Path) -> bool {
    let directories = [one, other].map(|path| fs::canonicalize(directory_of(path)).ok());
    directories[0].is_some() && directories[0] == directories[1] && one.file_name() == other.file_name()
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn address(path: &Path) -> Result<SocketAddrUnix, BindError> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > PATH_MAX_BYTES {
        return Err(BindError::TooLong { path: path.into(), bytes });
    }
    SocketAddrUnix::new(path).map_err(|e| BindError::Io { path: path.into(), action: "use the path", source: e.into() })
}

fn permission(path: &Path, place: &Path) -> BindError {
    let advice = permission_advice(place, "choose a directory that you may write to");
    BindError::Permission { path: path.into(), advice }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Non-blocking, so that a server too busy to accept is met with EAGAIN rather than waited for.
fn stream_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

/// Whether a socket lies there at which nobody listens.
fn holds_stale(path: &Path, address: &SocketAddrUnix) -> Result<bool, BindError> {
    let failed = |action, source: io::Error| BindError::Io { path: path.into(), action, source };
    let meta = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            return Err(permission(path, path));
        }
        other => other.map_err(|e| failed("look at what is there", e))?,
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket(path.into()));
    }
    let probe = stream_socket().map_err(|e| failed("make a socket", e.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(Errno::ACCESS) => Err(permission(path, path)),
        // A dead server answers for as long as the kernel has work of its: the volume's lock is what to wait for.
        Ok(()) if listener_is_dead(probe) => Ok(true),
        // EAGAIN: its backlog is full. EPROTOTYPE: it is no stream socket, but somebody holds it.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::InUse(path.into())),
        Err(e) => Err(failed("find out whether a server runs there", e.into())),
    }
}

/// Whether the process at the other end has ended and only its I/O keeps it in the kernel (proc(5): state Z).
fn listener_is_dead(connected: OwnedFd) -> bool {
    let peer = || {
        // Only for its safe way to SO_PEERCRED, which it offers inside of a runtime.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let _inside = runtime.enter();
        tokio::net::UnixStream::from_std(connected.into())?.peer_cred()
    };
    let Some(pid) = peer().ok().and_then(|credentials| credentials.pid()) else { return false };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it may have brackets and blanks of its own.
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_new_socket_takes_connections_from_owner_and_group_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = bind_unix(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_refused_and_survives() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, _file) = bind_unix(&path).unwrap();
        let error = bind_unix(&path).unwrap_err();
        assert!(error.to_string().contains("is in use by a running server"), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_whose_backlog_is_full_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, _file) = bind_unix(&path).unwrap();
        let address = SocketAddrUnix::new(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = stream_socket().unwrap();
            if connect(&client, &address) == Err(Errno::AGAIN) {
                break;
            }
            waiting.push(client);
        }
        assert!(matches!(bind_unix(&path), Err(BindError::InUse(_))));
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = bind_unix(&path).unwrap();
        drop(listener);
        std::mem::forget(file);
        bind_unix(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind_unix(&path), Err(BindError::NotASocket(_))));
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(matches!(bind_unix(&dir.path().join("link")), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_put_in_our_place_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = bind_unix(&path).unwrap();
        // The successor is made before ours goes, so that it cannot get the same inode.
        let (_successor, successor_file) = bind_unix(&dir.path().join("t")).unwrap();
        fs::rename(successor_file.path(), &path).unwrap();
        drop((listener, file));
        assert!(path.exists());
    }

    #[test]
    fn a_path_too_long_and_a_missing_directory_are_named_with_the_number() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        let error = bind_unix(&long).unwrap_err().to_string();
        assert!(error.contains(&format!("{} bytes", long.as_os_str().len())) && error.contains("107"), "{error}");
        let error = bind_unix(&dir.path().join("no/such/s")).unwrap_err().to_string();
        let missing = format!("there is no directory {}/no/such; create it first", dir.path().display());
        assert!(error.ends_with(&missing), "{error}");
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = bind_unix(&file.join("s")).unwrap_err();
        assert!(matches!(error, BindError::NoDirectory { directory, .. } if directory == file));
    }
}
