//! The last events of a volume, in memory, for whoever asks; and a line of log for each.

use std::collections::VecDeque;
use std::sync::PoisonError;

use super::report::{EventPage, EventRecord};
use crate::engine::event::{Event, Severity};
use crate::sync::{Mutex, MutexGuard};
use crate::units::Time;

/// Events kept; older ones are dropped and counted.
const EVENTS_MAX: usize = 4096;
/// Lines logged in [`LINES_SECONDS`], at most: a guest can cause as many events as it likes.
const LINES_MAX: u64 = 500;
const LINES_SECONDS: u64 = 10;

#[derive(Default)]
struct Log {
    events: VecDeque<EventRecord>,
    last_seq: u64,
    dropped: u64,
    lines: Lines,
    lasts: Lasts,
}

/// When something last happened, seconds since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lasts {
    /// A block moved to a slot.
    pub remap: Option<f64>,
    /// A device failed.
    pub device_error: Option<f64>,
}

/// How much was logged lately.
#[derive(Default)]
struct Lines {
    /// Number of the stretch of time, from the volume's start.
    stretch: u64,
    events: u64,
}

impl Lines {
    /// Count an event at `time`: whether to log it, and how many were left out before.
    fn count(&mut self, time: Time) -> (bool, u64) {
        let stretch = time.0 / (LINES_SECONDS * 1_000_000_000);
        let mut left_out = 0;
        if stretch > self.stretch {
            left_out = self.events.saturating_sub(LINES_MAX);
            *self = Lines { stretch, events: 0 };
        }
        self.events += 1;
        (self.events <= LINES_MAX, left_out)
    }
}

/// A bounded log. Its lock is held for copying only, never across I/O.
pub struct EventLog {
    volume: String,
    /// Seconds since the epoch at time 0 of the volume's clock.
    epoch: f64,
    log: Mutex<Log>,
}

impl EventLog {
    /// An empty log of the volume by that name.
    pub fn new(volume: String, epoch: f64) -> EventLog {
        EventLog { volume, epoch, log: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keep an event and log it.
    pub fn push(&self, event: Event) {
        let record = EventRecord {
            seq: 0,
            time: self.epoch + (event.time.0 / 1_000_000) as f64 / 1000.0,
            severity: event.severity.name().into(),
            kind: event.kind.into(),
            device: event.device.map(|device| device.to_string()).unwrap_or_default(),
            sector: (!event.range.is_empty()).then_some(event.range.start.0),
            sectors: event.range.count,
            cause: event.cause,
            action: event.action,
        };
        let is_device_error = event.severity != Severity::Info && event.device.is_some();
        let level = match event.severity {
            Severity::Info => log::Level::Info,
            Severity::Warn => log::Level::Warn,
            Severity::Error => log::Level::Error,
        };
        let place = match record.sector {
            Some(sector) => format!(" sector {sector}+{}", record.sectors),
            None => String::new(),
        };
        let (in_time, left_out) = self.lock().lines.count(event.time);
        if left_out > 0 {
            log::warn!("{}: {left_out} events more than {LINES_MAX} in {LINES_SECONDS} s were not logged", self.volume);
        }
        if in_time {
            let EventRecord { kind, device, cause, action, .. } = &record;
            let concerned = if device.is_empty() && place.is_empty() { "" } else { ": " };
            log::log!(level, "{}: {kind}{concerned}{device}{place}: {cause}: {action}", self.volume);
        }
        let mut log = self.lock();
        if record.kind == "remapped" {
            log.lasts.remap = Some(record.time);
        }
        if is_device_error {
            log.lasts.device_error = Some(record.time);
        }
        log.last_seq += 1;
        let seq = log.last_seq;
        log.events.push_back(EventRecord { seq, ..record });
        if log.events.len() > EVENTS_MAX {
            log.events.pop_front();
            log.dropped += 1;
        }
    }

    /// Events after number `after`, at most `limit`.
    pub fn page(&self, after: u64, limit: usize) -> EventPage {
        let log = self.lock();
        let events: Vec<EventRecord> = log.events.iter().filter(|e| e.seq > after).take(limit).cloned().collect();
        let last_seq = events.last().map_or(after.min(log.last_seq), |event| event.seq);
        EventPage { events, last_seq, dropped: log.dropped }
    }

    /// When things last happened.
    pub fn lasts(&self) -> Lasts {
        self.lock().lasts
    }

    /// Events dropped because the log was full.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_events_is_logged_in_part_and_says_so() {
        let mut lines = Lines::default();
        let second = |n: u64| Time(n * 1_000_000_000);
        let logged = (0..LINES_MAX + 70).filter(|_| lines.count(second(3)).0).count() as u64;
        assert_eq!(logged, LINES_MAX);
        assert_eq!(lines.count(second(9)), (false, 0));
        assert_eq!(lines.count(second(10)), (true, 71));
        assert_eq!(lines.count(second(20)), (true, 0));
    }
}
