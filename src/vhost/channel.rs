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

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};

    use super::*;

    fn listening(channel: &Channel) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        channel.open(ours.into());
        theirs
    }

    fn told(front_end: &mut UnixStream) -> usize {
        let mut count = 0;
        let mut message = [0; 12];
        while let Ok(12) = front_end.read(&mut message) {
            assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            count += 1;
        }
        count
    }

    #[test]
    fn each_front_end_is_told_once_its_queues_are_started() {
        let channel = Channel::new();
        channel.announce();
        assert!(!channel.is_due());
        let mut front_end = listening(&channel);
        channel.announce();
        channel.tell();
        assert_eq!(told(&mut front_end), 0);
        channel.set_started(true);
        assert!(channel.is_due());
        channel.tell();
        channel.tell();
        assert_eq!((told(&mut front_end), channel.is_due()), (1, false));
        channel.announce();
        assert_eq!(told(&mut front_end), 1);
        channel.close();
        let mut next = listening(&channel);
        channel.set_started(true);
        assert!(channel.is_due());
        channel.tell();
        assert_eq!((told(&mut front_end), told(&mut next)), (0, 1));
    }

    #[test]
    fn a_front_end_that_does_not_read_is_not_waited_for() {
        let channel = Channel::new();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while ours.write(&[0; 4096]).map_err(|error| assert_eq!(error.kind(), ErrorKind::WouldBlock)).is_ok() {}
        ours.set_nonblocking(false).unwrap();
        channel.open(ours.into());
        channel.set_started(true);
        channel.announce();
        assert!(!channel.is_due());
        drop(theirs);
        channel.announce();
    }
}
