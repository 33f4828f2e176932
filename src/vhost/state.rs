//! The channel on which a device's state goes to the front-end, or comes from it (vhost-user "Migrating back-end
//! state"): a pipe, as a rule, whose other end is in other hands.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::wait::poll;

/// How long the other end may take for its next step.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than any state has.
const STATE_MAX: usize = 64 << 10;

/// Why a state did not get through.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("the state's channel: {0}")]
    Io(#[from] io::Error),
    #[error("the state's channel: nothing went through for {} s", PATIENCE.as_secs())]
    Stuck,
    #[error("the state's channel: more than {STATE_MAX} bytes came")]
    TooLong,
}

fn await_turn(channel: &File, wanted: PollFlags) -> Result<(), StateError> {
    let in_time = poll(&mut [PollFd::new(channel, wanted)], Some(PATIENCE))?;
    if in_time { Ok(()) } else { Err(StateError::Stuck) }
}

/// Everything to the other end's close.
///
/// # Errors
/// When the other end stops in the middle, or does not end.
pub(super) fn read(mut channel: &File) -> Result<Vec<u8>, StateError> {
    let mut state = Vec::new();
    let mut part = [0; 4096];
    loop {
        await_turn(channel, PollFlags::IN)?;
        match channel.read(&mut part)? {
            0 => return Ok(state),
            _ if state.len() > STATE_MAX => return Err(StateError::TooLong),
            count => state.extend_from_slice(&part[..count]),
        }
    }
}

/// All of `state`.
///
/// # Errors
/// When the other end does not read, or has gone.
pub(super) fn write(mut channel: &File, mut state: &[u8]) -> Result<(), StateError> {
    while !state.is_empty() {
        await_turn(channel, PollFlags::OUT)?;
        // No more than a pipe takes at once when it says that it has room.
        let count = channel.write(&state[..state.len().min(4096)])?;
        state = &state[count..];
    }
    Ok(())
}
