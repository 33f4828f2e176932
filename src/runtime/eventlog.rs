//! The last events of a volume, in memory, for whoever asks; and a line of log for each.

use std::collections::VecDeque;
use std::sync::PoisonError;

use log::Record;
use log::kv::Value;
use uuid::Uuid;

use super::lines::{EVENT_LINES_MAX, LINES_SECONDS, Lines};
use super::report::{EventPage, EventRecord};
use crate::engine::event::{Event, Severity};
use crate::sync::{Mutex, MutexGuard};

/// Events kept; older ones are dropped and counted.
const EVENTS_MAX: usize = 4096;
/// Levels that a line of log can have, counted from 1.
const LEVELS: usize = log::Level::Trace as usize + 1;

#[derive(Default)]
struct Log {
    events: VecDeque<EventRecord>,
    last_seq: u64,
    dropped: u64,
    /// By level.
    lines: [Lines; LEVELS],
    /// When a block last moved to a slot, seconds since the epoch.
    last_remap: Option<f64>,
}

/// A bounded log. Its lock is held for copying only, never across I/O.
pub struct EventLog {
    volume: String,
    /// Of these events and no others.
    run: String,
    /// Seconds since the epoch at time 0 of the volume's clock.
    epoch: f64,
    log: Mutex<Log>,
}

impl EventLog {
    /// An empty log of the volume by that name.
    pub fn new(volume: String, epoch: f64) -> EventLog {
        EventLog { volume, run: Uuid::new_v4().to_string(), epoch, log: Mutex::default() }
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
            kind: event.kind.name().into(),
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
        if level <= log::max_level() {
            // Each level by itself: what matters most is not crowded out.
            let (in_time, left_out) = self.lock().lines[level as usize].count(event.time, EVENT_LINES_MAX);
            if left_out > 0 {
                log::warn!(
                    "{}: {left_out} events of level {level} more than {EVENT_LINES_MAX} in {LINES_SECONDS} s were not logged",
                    self.volume
                );
            }
            if in_time {
                self.write(level, &record);
            }
        }
        let mut log = self.lock();
        if record.kind == "remapped" {
            log.last_remap = Some(record.time);
        }
        log.last_seq += 1;
        let seq = log.last_seq;
        log.events.push_back(EventRecord { seq, ..record });
        if log.events.len() > EVENTS_MAX {
            log.events.pop_front();
            log.dropped += 1;
        }
    }

    /// One line with volume, device, sector, cause and action, of which a logger can also have each by itself.
    fn write(&self, level: log::Level, record: &EventRecord) {
        let EventRecord { kind, device, cause, action, .. } = record;
        let place = match record.sector {
            Some(sector) => format!(" sector {sector}+{}", record.sectors),
            None => String::new(),
        };
        let concerned = if device.is_empty() && place.is_empty() { "" } else { ": " };
        let parts = [
            ("volume", Value::from(self.volume.as_str())),
            ("event", Value::from(kind.as_str())),
            ("device", Value::from(device.as_str())),
            ("sector", record.sector.map_or_else(Value::null, Value::from)),
            ("sectors", Value::from(record.sectors)),
            ("cause", Value::from(cause.as_str())),
            ("action", Value::from(action.as_str())),
        ];
        let target = module_path!();
        let args = format_args!("{}: {kind}{concerned}{device}{place}: {cause}: {action}", self.volume);
        let mut line = Record::builder();
        let line = line.level(level).target(target).module_path_static(Some(target)).key_values(&parts);
        log::logger().log(&line.args(args).build());
    }

    /// Events after number `after`, at most `limit`.
    pub fn page(&self, after: u64, limit: usize) -> EventPage {
        let log = self.lock();
        let events: Vec<EventRecord> = log.events.iter().filter(|e| e.seq > after).take(limit).cloned().collect();
        let last_seq = events.last().map_or(after.min(log.last_seq), |event| event.seq);
        EventPage { events, last_seq, dropped: log.dropped, volume: self.volume.clone(), run: self.run.clone() }
    }

    /// When a block last moved to a slot, seconds since the epoch.
    pub fn last_remap(&self) -> Option<f64> {
        self.lock().last_remap
    }

    /// Events dropped because the log was full.
    pub fn dropped(&self) -> u64 {
        self.lock().dropped
    }
}
