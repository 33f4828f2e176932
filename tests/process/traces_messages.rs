//! Messages of the vhost-user protocol as plain data, and as bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Longest wait for an answer of the protocol.
const PROTOCOL_LIMIT: Duration = Duration::from_secs(30);

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;

/// Flags of a message: version 1, and that its sender wants an answer where it would get none.
pub(crate) const PLAIN: u32 = 1;
pub(crate) const NEED_REPLY: u32 = 9;
/// Those of an answer.
const REPLY: u32 = 5;

/// Features of the device, all of them: those of virtio-blk are SIZE_MAX, SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY,
/// CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, LIFETIME; then LOG_ALL, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES,
/// VERSION_1, RING_PACKED.
pub(crate) const OFFERED: u64 = 0x5_7400_fe46;
/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, DEVICE_STATE,
/// GET_VRING_BASE_INFLIGHT.
pub(crate) const PROTOCOL_OFFERED: u64 = 0x18_b22b;
pub(crate) const F_FLUSH: u64 = 1 << 9;

/// One message.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) body: Body,
    pub(crate) fds: Vec<Fd>,
    pub(crate) answer: Answer,
}

/// A payload.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Empty,
    Word(u64),
    /// Ring and number.
    State(u32, u32),
    /// Ring and where it goes on.
    Base(u32, Index),
    /// The ring's addresses.
    Ring(u32),
    /// All regions of memory.
    Table,
    /// One of them.
    Region(usize),
    /// Offset, length and flags of a part of the configuration, and zeros in its place.
    Config(u32, u32, u32),
    /// The `writeback` byte and flags.
    Writeback(u8, u32),
    /// Rings and entries to be tracked.
    Inflight(u16, u16),
    /// The answer to that.
    InflightBack,
}

/// An index of a ring as it is when the message is sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Index {
    Used,
    Avail,
}

/// A descriptor that goes with a message.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fd {
    Kick(u32),
    Call(u32),
    Err,
    Memory,
    Inflight,
    /// Where the device may speak.
    Channel,
}

/// What must come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    None,
    /// "Done", for those who asked to be told.
    Ack,
    Word(u64),
    /// The part of the configuration that was asked for.
    Config,
    /// The ring and its used index: whatever it holds is left for the next start.
    Base,
    Inflight,
}

pub(crate) fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

pub(crate) fn halves(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Header and payload.
pub(crate) fn framed(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).expect("short");
    [halves(&[request, flags, size]), payload.to_vec()].concat()
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("a back-end listens");
    stream.set_read_timeout(Some(PROTOCOL_LIMIT)).expect("a socket");
    stream.set_write_timeout(Some(PROTOCOL_LIMIT)).expect("a socket");
    stream
}

/// An answer, and the descriptor that came with it.
pub(crate) struct Received {
    pub(crate) request: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) file: Option<File>,
}

/// The next answer; `None` where the server has closed the connection.
pub(crate) fn receive(socket: &UnixStream) -> io::Result<Option<Received>> {
    let mut header = [0_u8; 12];
    let (len, file) = socket.recv_with_fd(&mut header).map_err(io::Error::from)?;
    if len == 0 {
        return Ok(None);
    }
    assert_eq!(len, header.len(), "an answer begins with a whole header");
    let half = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let request = half(0);
    assert_eq!(half(4), REPLY, "flags of the answer to {request}");
    let mut payload = vec![0; usize::try_from(half(8)).expect("short")];
    (&*socket).read_exact(&mut payload)?;
    Ok(Some(Received { request, payload, file }))
}
