//! Asking the server, again and again.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::app::Wanted;
use super::shot::{Shot, Status};
use crate::cli::report_args::TopArgs;
use crate::cli::run::{CliError, Server};
use crate::control::api::{EVENTS_LIMIT_MAX, Pong};
use crate::control::client::ClientError;
use crate::runtime::report::EventPage;
use crate::runtime::surface::SurfaceReport;

/// How long an answer may take: all come from memory.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Cells of the surface: more than most terminals have, fewer are made of them.
const CELLS: u64 = 4096;
/// The surface costs the server a walk over its map: it is asked for this often at most, and so that it takes a
/// twentieth of the time at most.
const SURFACE_PAUSE: Duration = Duration::from_secs(5);
const SURFACE_SHARE: u32 = 20;

/// A server, and how far we are with it.
pub(super) struct Feed {
    server: Server,
    /// The volume asked for, where one was.
    wanted: Option<String>,
    after: u64,
    run: String,
    surface_due: Option<Instant>,
}

impl Feed {
    pub(super) fn new(args: &TopArgs) -> Result<Feed, CliError> {
        let server = Server::at(&args.control_path)?;
        Ok(Feed { server, wanted: args.volume.clone(), after: 0, run: String::new(), surface_due: None })
    }

    /// Everything once.
    pub(super) fn ask(&mut self) -> Result<Shot, ClientError> {
        let pong: Pong = self.server.ask("/v1/ping", &[], TIMEOUT)?;
        let name = self.wanted.clone().or_else(|| pong.volumes.first().cloned()).unwrap_or_default();
        self.server.choose(&name);
        let Status { report: status, scan } = self.server.ask("/v1/status", &[], TIMEOUT)?;
        let stats = self.server.ask("/v1/stats", &[], TIMEOUT)?;
        let health = unless_closed(self.server.ask("/v1/health", &[], TIMEOUT))?;
        let surface = self.surface()?;
        let page: EventPage = self.events()?;
        let events_anew = self.run != page.run;
        let page = if events_anew && self.after > 0 {
            self.after = 0;
            self.events()?
        } else {
            page
        };
        (self.after, self.run) = (page.last_seq.max(self.after), page.run);
        Ok(Shot { names: pong.volumes, name, status, scan, stats, health, surface, events: page.events, events_anew })
    }

    fn events(&self) -> Result<EventPage, ClientError> {
        let query = [("after", self.after.to_string()), ("limit", EVENTS_LIMIT_MAX.to_string())];
        self.server.ask("/v1/events", &query, TIMEOUT)
    }

    fn surface(&mut self) -> Result<Option<SurfaceReport>, ClientError> {
        let began = Instant::now();
        if self.surface_due.is_some_and(|due| began < due) {
            return Ok(None);
        }
        let surface = unless_closed(self.server.ask("/v1/surface", &[("cells", CELLS.to_string())], TIMEOUT))?;
        let pause = (began.elapsed() * SURFACE_SHARE).max(SURFACE_PAUSE);
        self.surface_due = Some(Instant::now() + pause);
        Ok(surface)
    }

    /// Ask until nobody takes the answers, or gives orders.
    pub(super) fn run(
        mut self,
        mut interval: Duration,
        orders: &Receiver<Wanted>,
        answer: impl Fn(Result<Box<Shot>, String>) -> bool,
    ) {
        let mut paused = false;
        loop {
            let order = match paused {
                true => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => orders.recv_timeout(interval),
            };
            match order {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) | Ok(Wanted::End) => return,
                Ok(Wanted::Interval(new)) => interval = new,
                Ok(Wanted::Pause(now)) => paused = now,
                Ok(Wanted::Volume(name)) => {
                    (self.wanted, self.after, self.surface_due) = (Some(name), 0, None);
                    self.run.clear();
                }
            }
            if !paused && !answer(self.ask().map(Box::new).map_err(|error| error.to_string())) {
                return;
            }
        }
    }
}

/// What only an open volume says.
fn unless_closed<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    const CONFLICT: u16 = 409;
    match answer {
        Err(ClientError::Refused { status: CONFLICT, .. }) => Ok(None),
        answer => answer.map(Some),
    }
}
