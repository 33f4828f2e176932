//! The backend channel: a socket on which the device speaks to the front-end unasked (vhost-user, "Back-end
//! communication").

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};

use crate::sync::{Mutex, MutexGuard};

/// The message that brings the channel.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: the configuration is not what it was. Version 1, no answer wanted, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The socket that comes with the next message, if that is SET_BACKEND_REQ_FD. The message stays there: it is for the
/// crate to judge, which takes the socket and has no sender for what is to be said on it.
pub(super) fn peek(socket: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; 4];
    let (read, _) = recv(socket, &mut request, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
    if read < request.len() || u32::from_le_bytes(request) != SET_BACKEND_REQ_FD {
        return None;
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(socket, &mut [IoSliceMut::new(&mut request)], &mut ancillary, flags).ok()?;
    let mut messages = ancillary.drain();
    messages.find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    })
}

/// The channel to the front-end that is connected, and what is to be said there.
pub(super) struct Channel(Mutex<State>);

struct State {
    socket: Option<OwnedFd>,
    /// A queue is started. Without one QEMU 7.2 takes no message: it looks for the device in what it has not filled in.
    started: bool,
    /// The front-end may not know the configuration as it is.
    is_due: bool,
}

impl Channel {
    /// To nobody yet. Who comes may have known the disk before this process served it.
    pub(super) fn new() -> Channel {
        Channel(Mutex::new(State { socket: None, started: false, is_due: true }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The front-end listens there.
    pub(super) fn open(&self, socket: OwnedFd) {
        self.state().socket = Some(socket);
    }

    /// It has gone.
    pub(super) fn close(&self) {
        *self.state() = State { socket: None, started: false, is_due: true };
    }

    /// Whether a queue is started.
    pub(super) fn set_started(&self, started: bool) {
        self.state().started = started;
    }

    /// The configuration has changed: say so, as soon as that can be.
    pub(super) fn announce(&self) {
        self.state().is_due = true;
        self.tell();
    }

    /// Whether there is something to say, to somebody who can hear it.
    pub(super) fn is_due(&self) -> bool {
        let state = self.state();
        state.is_due && state.started && state.socket.is_some()
    }

    /// Say what is to be said, if it can be.
    pub(super) fn tell(&self) {
        let mut state = self.state();
        if let State { socket: Some(socket), started: true, is_due: true } = &*state {
            tell_config_change(socket);
            state.is_due = false;
        }
    }
}

/// Tell the front-end that the configuration has changed. One that does not read its messages is not waited for.
fn tell_config_change(socket: &OwnedFd) {
    let message = CONFIG_CHANGE.map(u32::to_le_bytes).concat();
    match send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(sent) if sent == message.len() => log::debug!("the front-end is told to look at the configuration"),
        Ok(_) => log::warn!("the front-end reads nothing, and was told of a new size by half"),
        Err(errno) => log::warn!("the front-end cannot be told of a new size: {errno}; it has to ask"),
    }
}
