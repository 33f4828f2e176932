//! Asking a server over its control socket, one request a connection, with a deadline.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::api::Failure;
use super::socket::PATH_MAX_BYTES;

/// How long a report may take: it comes from memory.
pub const REPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an order may take: it may wait for slow disks and their retries.
pub const ORDER_TIMEOUT: Duration = Duration::from_secs(300);

/// The longest answer taken. The longest sent, a page of `list` or events, is a few megabytes.
const ANSWER_MAX: usize = 64 << 20;

/// Why there is no answer: one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no socket.
    #[error(
        "{}: no control socket there; the server may not be running, or was given another --control-path",
        .0.display()
    )]
    NoSocket(PathBuf),
    /// Nobody listens.
    #[error("{}: nobody answers on this control socket; the server has ended, start it again", .0.display())]
    NotListening(PathBuf),
    /// Something else is there.
    #[error("{}: is no socket; --control-path names the server's control socket, by default its --socket-path with .ctl appended", .0.display())]
    NotASocket(PathBuf),
    /// The kernel has no room for the path.
    #[error("{}: the path has {bytes} bytes, a Unix socket path at most {PATH_MAX_BYTES}; use a relative or shorter one", path.display())]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// The caller may not connect.
    #[error("{}: permission denied; {advice}", path.display())]
    Permission {
        /// The socket.
        path: PathBuf,
        /// Whose it is and what to do.
        advice: String,
    },
    /// No answer in time.
    #[error("{}: no answer within {seconds} s; the server is busy or stuck, see its log", path.display())]
    Timeout {
        /// The socket.
        path: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The connection broke, or what came is no HTTP.
    #[error("{}: {what}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        what: String,
    },
    /// The server refused; the text is its own.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// One line.
        message: String,
    },
}

/// A control socket to ask.
pub struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// Ask the server at `path`. Nothing is connected yet.
    ///
    /// # Errors
    /// When no event loop can be made (no file descriptors left).
    pub fn new(path: &Path) -> Result<Client, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| ClientError::Broken { path: path.into(), what: format!("no event loop: {e}") })?;
        Ok(Client { path: path.into(), runtime })
    }

    /// Get a document.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get<T: DeserializeOwned>(&self, target: &str, timeout: Duration) -> Result<T, ClientError> {
        self.document(&self.request(Method::GET, target, Bytes::new(), timeout)?)
    }

    /// Get the answer as text.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get_text(&self, target: &str, timeout: Duration) -> Result<String, ClientError> {
        let bytes = self.request(Method::GET, target, Bytes::new(), timeout)?;
        String::from_utf8(bytes.into()).map_err(|e| self.broken(format!("the answer is no text: {e}")))
    }

    /// Post a document.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn post<T: DeserializeOwned>(
        &self,
        target: &str,
        document: &impl Serialize,
        timeout: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(document).expect("documents are plain data with string keys");
        self.document(&self.request(Method::POST, target, body.into(), timeout)?)
    }

    /// Delete something.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn delete<T: DeserializeOwned>(&self, target: &str, timeout: Duration) -> Result<T, ClientError> {
        self.document(&self.request(Method::DELETE, target, Bytes::new(), timeout)?)
    }

    fn document<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(bytes)
            .map_err(|e| self.broken(format!("the answer is not understood ({e}); is the server of another version?")))
    }

    fn request(&self, method: Method, target: &str, body: Bytes, timeout: Duration) -> Result<Bytes, ClientError> {
        let exchange = async { tokio::time::timeout(timeout, self.exchange(method, target, body)).await };
        match self.runtime.block_on(exchange) {
            Ok(result) => result,
            Err(_) => Err(ClientError::Timeout { path: self.path.clone(), seconds: timeout.as_secs() }),
        }
    }

    async fn exchange(&self, method: Method, target: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let stream = UnixStream::connect(&self.path).await.map_err(|e| self.connect_error(&e))?;
        let broken = |e: hyper::Error| {
            self.broken(format!("the connection broke ({e}); is it the control socket of a server that runs?"))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Its errors come back through the sender too.
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| self.broken(format!("bad request {target}: {e}")))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let answer = Limited::new(response.into_body(), ANSWER_MAX).collect().await;
        let answer = answer
            .map_err(|e| self.broken(format!("the answer broke off ({e}); see whether the server still runs")))?
            .to_bytes();
        drop(sender);
        connection.abort();
        if status.is_success() {
            return Ok(answer);
        }
        let message = match serde_json::from_slice::<Failure>(&answer) {
            Ok(failure) => failure.error,
            Err(_) => format!("{}: the server answered {status}", self.path.display()),
        };
        Err(ClientError::Refused { status: status.as_u16(), message })
    }

    fn broken(&self, what: String) -> ClientError {
        ClientError::Broken { path: self.path.clone(), what }
    }

    fn connect_error(&self, error: &io::Error) -> ClientError {
        let path = self.path.clone();
        let bytes = path.as_os_str().len();
        let is_other = fs::metadata(&path).is_ok_and(|meta| !meta.file_type().is_socket());
        match error.kind() {
            _ if bytes > PATH_MAX_BYTES => ClientError::TooLong { path, bytes },
            _ if is_other => ClientError::NotASocket(path),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => ClientError::NoSocket(path),
            io::ErrorKind::ConnectionRefused => ClientError::NotListening(path),
            io::ErrorKind::PermissionDenied => {
                let advice = permission_advice(&path, "run as a member of that group, or as root");
                ClientError::Permission { path, advice }
            }
            _ => self.broken(format!("cannot connect ({error}); see whether the server runs")),
        }
    }
}

/// Whose the path is, or the deepest directory on the way that can be seen, and what to do.
pub(super) fn permission_advice(path: &Path, what_to_do: &str) -> String {
    for place in path.ancestors() {
        // The last ancestor of a relative path is empty and means the working directory.
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        let Ok(meta) = fs::metadata(place) else { continue };
        let group = group_name(meta.gid());
        let mode = meta.mode() & 0o7777;
        return format!("{} belongs to group {group} (mode {mode:04o}): {what_to_do}", place.display());
    }
    what_to_do.into()
}

/// The group's name from /etc/group, else its number. Groups from other sources (LDAP) show as numbers.
fn group_name(gid: u32) -> String {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| gid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_socket_says_what_may_be_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(&dir.path().join("ctl")).unwrap();
        let error = client.get_text("/proc", REPORT_TIMEOUT).unwrap_err().to_string();
        assert!(error.contains("--control-path") && error.contains("may not be running"), "{error}");
    }

    #[test]
    fn a_socket_nobody_listens_on_says_that_the_server_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = Client::new(&path).unwrap().get_text("/proc", REPORT_TIMEOUT).unwrap_err();
        assert!(matches!(error, ClientError::NotListening(_)), "{error}");
    }

    #[test]
    fn a_server_that_never_answers_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Client::new(&path).unwrap().get_text("/proc", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    }

    #[test]
    fn permission_advice_names_the_place_and_its_group() {
        let dir = tempfile::tempdir().unwrap();
        let meta = fs::metadata(dir.path()).unwrap();
        let (group, mode) = (group_name(meta.gid()), meta.mode() & 0o7777);
        let advice = permission_advice(&dir.path().join("not/there"), "go away");
        let expected = format!("{} belongs to group {group} (mode {mode:04o}): go away", dir.path().display());
        assert_eq!(advice, expected);
        assert_eq!(group_name(0), "root");
    }
}
