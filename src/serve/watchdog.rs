//! What systemd is told (sd_notify(3)): that the server serves, how it fares, and that it is alive.
//!
//! Alive means that requests can be served, not that a disk answers: the healer and every worker hear a message and
//! answer it, and the protocol thread is not held up by a message of the front-end for longer than the watchdog waits.
//! A disk that takes its time holds up none of them: operations are waited for together with messages. What a disk
//! may hold up is a message that has to wait for requests under way (GET_VRING_BASE, memory that goes away) and the
//! opening and closing of the volume; these count as alive. So a server is reported dead when one of its threads hangs
//! in the kernel or runs in circles, and not when its disk is slow or gone.

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use sd_notify::NotifyState;

use crate::runtime::handover::HeldVolume;
use crate::vhost::status::ServerStatus;

/// How often systemd is told how the volume fares, where it has set no watchdog.
const STATUS_INTERVAL: Duration = Duration::from_secs(30);

/// Tells systemd, until it is dropped; does nothing where there is no systemd.
pub(super) struct Watchdog {
    closing: Arc<AtomicBool>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// From now on the volume is served.
    pub(super) fn start(volume: Arc<HeldVolume>, server: Arc<ServerStatus>) -> std::io::Result<Watchdog> {
        let closing = Arc::new(AtomicBool::new(false));
        if env::var_os("NOTIFY_SOCKET").is_none() {
            return Ok(Watchdog { closing, stop: None, thread: None });
        }
        let limit = sd_notify::watchdog_enabled();
        // Three times, as one may come late.
        let every = limit.map_or(STATUS_INTERVAL, |limit| limit / 3);
        tell(&[NotifyState::Ready, NotifyState::Status(&line(&volume))]);
        let (stop, stopped) = channel();
        let is_closing = closing.clone();
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(move || {
            while stopped.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if is_closing.load(Relaxed) {
                    // How long that may take is for TimeoutStopSec to say.
                    tell(&[NotifyState::Watchdog]);
                    continue;
                }
                match hung(&volume, &server, limit) {
                    None => tell(&[NotifyState::Watchdog, NotifyState::Status(&line(&volume))]),
                    Some(what) => log::error!("{what}: systemd is not told that the server is alive"),
                }
            }
        })?;
        Ok(Watchdog { closing, stop: Some(stop), thread: Some(thread) })
    }

    /// From now on the volume is being closed.
    pub(super) fn closing(&self) {
        self.closing.store(true, Relaxed);
        if self.thread.is_some() {
            tell(&[NotifyState::Stopping, NotifyState::Status("closing the volume")]);
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It panics with nothing half done.
            let _ = thread.join();
        }
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("systemd cannot be told: {error}");
    }
}

/// What hangs, if something does.
fn hung(volume: &HeldVolume, server: &ServerStatus, limit: Option<Duration>) -> Option<&'static str> {
    let limit = limit.unwrap_or(STATUS_INTERVAL);
    let waits_for_a_disk = server.in_flight() > 0 || volume.is_changing_hands();
    if server.message_under_way() > limit && !waits_for_a_disk {
        return Some("the protocol thread hangs");
    }
    // A volume that is away, or on its way, has nobody to ask.
    (!volume.is_changing_hands() && !volume.has_pulse()).then_some("a worker or the healer does not answer")
}

fn line(volume: &HeldVolume) -> String {
    let status = volume.status();
    let (state, blocks) = (status.state.join(", "), &status.blocks);
    format!("{state}: {} of {} remaps, {} lost sectors", blocks.remapped, blocks.remaps_max, blocks.lost_sectors)
}
