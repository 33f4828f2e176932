//! Who may ask for what: over TCP everybody who gets there may read, and on the control socket, where a group was let
//! in, its members may.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

use super::bounded::Bounded;
use super::routes::Refusal;

/// The user at the other end of a connection; `None` where the kernel does not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(Option<u32>);

impl Connected<IncomingStream<'_, Bounded<UnixListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded<UnixListener>>) -> Peer {
        Peer(stream.io().stream.peer_cred().ok().map(|credentials| credentials.uid()))
    }
}

/// Whether that user is root or the server's own.
pub(super) fn is_owner(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// A group that may read, where there is one.
pub(super) type Readers = Option<String>;

/// Members of the readers' group may only read: orders are for root and the server's own user.
pub(super) async fn readers_only_read(
    State(readers): State<Readers>,
    ConnectInfo(Peer(uid)): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let own = rustix::process::geteuid().as_raw();
    let may_order = uid.is_some_and(is_owner);
    match readers {
        Some(group) if !may_order && !is_reading(request.method()) => {
            let error = format!("members of group {group} may only read here; give orders as root or as user {own}");
            Refusal(StatusCode::FORBIDDEN, error).into_response()
        }
        _ => next.run(request).await,
    }
}

fn is_reading(method: &Method) -> bool {
    [Method::GET, Method::HEAD].contains(method)
}

/// A page of another site, whose name was made to lead here (DNS rebinding), calls us by that name: only addresses and
/// `localhost` are ours.
pub(super) async fn called_by_address(request: Request, next: Next) -> Response {
    match check_host(request.headers(), request.uri()) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

fn check_host(headers: &HeaderMap, uri: &Uri) -> Result<(), Refusal> {
    let mut hosts: Vec<&str> = Vec::new();
    for host in headers.get_all(header::HOST) {
        hosts.push(host.to_str().map_err(|_| Refusal(StatusCode::BAD_REQUEST, "the Host header is no text".into()))?);
    }
    hosts.extend(uri.authority().map(|authority| authority.as_str()));
    if hosts.is_empty() {
        return Err(Refusal(StatusCode::BAD_REQUEST, "the request has no Host header".into()));
    }
    match hosts.iter().find(|host| !is_address(host)) {
        None => Ok(()),
        Some(host) => {
            let error = format!("called {host:?}; this server answers to its address and to localhost only");
            Err(Refusal(StatusCode::FORBIDDEN, error))
        }
    }
}

/// Whether it is an address or `localhost`, with a port or without (RFC 9110 §7.2).
fn is_address(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((inside, port)) if port.is_empty() || is_port(port) => {
                return inside.parse::<std::net::Ipv6Addr>().is_ok();
            }
            _ => return false,
        },
        None => host.split_once(':').map_or(host, |(name, port)| if is_digits(port) { name } else { "" }),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(is_digits)
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The number of a group, from its name in /etc/group or as it is; groups from other sources (LDAP) go by number.
fn group_id(group: &str) -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == group).then_some(())?;
        fields.nth(1)?.parse().ok()
    });
    named.or_else(|| group.parse().ok())
}

/// Why a group cannot be let in: one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// There is none.
    #[error("--control-group {0}: there is no such group in /etc/group; add it with `groupadd`, or give its number")]
    Unknown(String),
    /// The socket is not ours to give.
    #[error("--control-group {group}: {error}; start the server as root or as a member of that group")]
    Refused {
        /// The group.
        group: String,
        /// The reason.
        error: io::Error,
    },
}

/// Let a group connect to a socket.
///
/// # Errors
/// When there is no such group, or the process may not.
pub fn let_in(path: &Path, group: &str) -> Result<(), GroupError> {
    let id = group_id(group).ok_or_else(|| GroupError::Unknown(group.to_owned()))?;
    std::os::unix::fs::lchown(path, None, Some(id))
        .map_err(|error| GroupError::Refused { group: group.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_localhost_are_ours_and_other_names_are_not() {
        for host in ["localhost", "LocalHost:9100", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:9100", "192.0.2.7:1"] {
            assert!(is_address(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9100",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::1",
            "[evil]",
            "127.0.0.1:80:80",
            "localhost:",
            "[::1]80",
            "::1",
            "user@localhost",
        ] {
            assert!(!is_address(host), "{host}");
        }
    }

    #[test]
    fn each_name_that_a_request_calls_us_by_must_be_ours() {
        let check = |hosts: &[&str], uri: &str| {
            let mut headers = HeaderMap::new();
            hosts.iter().for_each(|host| _ = headers.append(header::HOST, host.parse().unwrap()));
            check_host(&headers, &uri.parse().unwrap()).map_err(|refusal| refusal.0.as_u16())
        };
        assert_eq!(check(&["localhost"], "/metrics"), Ok(()));
        assert_eq!(check(&[], "/metrics"), Err(400));
        assert_eq!(check(&["localhost", "evil.example"], "/metrics"), Err(403));
        assert_eq!(check(&["localhost"], "http://evil.example/metrics"), Err(403));
        assert_eq!(check(&["localhost"], "http://127.0.0.1:80/metrics"), Ok(()));
    }

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(group_id("4711"), Some(4711));
        assert_eq!(group_id("no such group"), None);
        let error = let_in(Path::new("/nowhere"), "no such group").unwrap_err().to_string();
        assert!(error.contains("no such group") && error.contains("groupadd"), "{error}");
    }
}
