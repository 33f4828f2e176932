//! The last events of a volume, in memory, for whoever asks; and a line of log for each.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use super::report::{EventPage, EventRecord};
use crate::engine::event::{Event, Severity};

/// Events kept; older ones are dropped and counted.
const EVENTS_MAX: usize = 4096;

#[derive(Default)]
struct Log {
    events: VecDeque<EventRecord>,
    last_seq: u64,
    dropped: u64,
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
        let level = match event.severity {
            Severity::Info => log::Level::Info,
            Severity::Warn => log::Level::Warn,
            Severity::Error => log::Level::Error,
        };
        let place = match record.sector {
            Some(sector) => format!(" sector {sector}+{}", record.sectors),
            None => String::new(),
        };
        let EventRecord { kind, device, cause, action, .. } = &record;
        log::log!(level, "{}: {kind}: {device}{place}: {cause}: {action}", self.volume);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
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
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let events: Vec<EventRecord> = log.events.iter().filter(|e| e.seq > after).take(limit).cloned().collect();
        let last_seq = events.last().map_or(after.min(log.last_seq), |event| event.seq);
        EventPage { events, last_seq, dropped: log.dropped }
    }

    /// Events dropped because the log was full.
    pub fn dropped(&self) -> u64 {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).dropped
    }
}
