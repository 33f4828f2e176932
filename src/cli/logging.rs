//! Log lines on stderr, as text or as JSON, and never more of them than a disk can take.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use clap::ValueEnum;
use log::kv::{Error, Key, Value, VisitSource};
use log::{LevelFilter, Log, Metadata, Record};
use serde::Serialize;

use crate::runtime::lines::{LINES_SECONDS, Lines, OTHER_LINES_MAX};
use crate::units::Time;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Log to stderr. Everything of ours passes the logger's own filter, so that the level can be changed
/// at run time with `log::set_max_level`; of the libraries, warnings.
pub fn init(level: LevelFilter, format: LogFormat) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Warn).filter_module("vhost_remap", LevelFilter::Trace);
    builder.format(move |out, record| match format {
        LogFormat::Text => {
            let time = out.timestamp_millis();
            let line = record.args().to_string().replace('\n', " ");
            writeln!(out, "{time} {:<5} {line}", record.level())
        }
        LogFormat::Json => write_json(out, record),
    });
    let limited = Limited { inner: builder.build(), began: Instant::now(), lines: Mutex::default() };
    // There is no other logger: this is the first thing that the program does.
    let _ = log::set_boxed_logger(Box::new(limited));
    log::set_max_level(level);
}

/// Passes on so many lines in a stretch of time. Lines of events have been counted by the event log.
struct Limited {
    inner: env_logger::Logger,
    began: Instant,
    lines: Mutex<Lines>,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.log_at(Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)), record);
    }

    fn flush(&self) {
        self.inner.flush();
    }
}

impl Limited {
    fn log_at(&self, now: Time, record: &Record<'_>) {
        if !self.inner.matches(record) {
            return;
        }
        if record.key_values().get(Key::from_str("event")).is_none() {
            let (in_time, left_out) =
                self.lines.lock().unwrap_or_else(PoisonError::into_inner).count(now, OTHER_LINES_MAX);
            if left_out > 0 {
                let args =
                    format_args!("{left_out} lines more than {OTHER_LINES_MAX} in {LINES_SECONDS} s were not logged");
                let said = Record::builder().level(log::Level::Warn).target(module_path!()).args(args).build();
                self.inner.log(&said);
            }
            if !in_time {
                return;
            }
        }
        self.inner.log(record);
    }
}

/// A line. What is not about an event has a message instead.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Line {
    time: String,
    level: &'static str,
    #[serde(flatten)]
    event: Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
}

/// The parts of an event, in the words of `events --json`.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Event {
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sector: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sectors: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<String>,
}

impl<'kvs> VisitSource<'kvs> for Event {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        let text = || Some(value.to_string()).filter(|text| !text.is_empty());
        match key.as_str() {
            "volume" => self.volume = text(),
            "event" => self.event = text(),
            "device" => self.device = text(),
            "sector" => self.sector = value.to_u64(),
            "sectors" => self.sectors = value.to_u64().filter(|sectors| *sectors > 0),
            "cause" => self.cause = text(),
            "action" => self.action = text(),
            _ => {}
        }
        Ok(())
    }
}

fn write_json(out: &mut dyn Write, record: &Record<'_>) -> io::Result<()> {
    let mut event = Event::default();
    record.key_values().visit(&mut event).map_err(io::Error::other)?;
    let line = Line {
        time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
        level: match record.level() {
            log::Level::Error => "error",
            log::Level::Warn => "warn",
            log::Level::Info => "info",
            log::Level::Debug => "debug",
            log::Level::Trace => "trace",
        },
        message: event.event.is_none().then(|| record.args().to_string()),
        event,
    };
    serde_json::to_writer(&mut *out, &line)?;
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a logger writes.
    #[derive(Clone, Default)]
    struct Written(std::sync::Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_of_lines_is_logged_in_part_and_hides_no_event() {
        let written = Written::default();
        let mut builder = env_logger::Builder::new();
        builder.filter_level(LevelFilter::Warn).target(env_logger::Target::Pipe(Box::new(written.clone())));
        builder.format(|out, record| writeln!(out, "{}", record.args()));
        let limited = Limited { inner: builder.build(), began: Instant::now(), lines: Mutex::default() };
        let log = |second: u64, text: &str, event: Option<&str>| {
            let pairs = event.map(|event| ("event", Value::from(event)));
            let args = format_args!("{text}");
            let mut record = Record::builder();
            let record = record.level(log::Level::Warn).target("vhost_remap").key_values(&pairs);
            limited.log_at(Time(second * 1_000_000_000), &record.args(args).build());
        };
        (0..OTHER_LINES_MAX + 30).for_each(|_| log(1, "refused", None));
        log(2, "a block moved", Some("remapped"));
        log(11, "refused again", None);
        let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.iter().filter(|line| **line == "refused").count() as u64, OTHER_LINES_MAX);
        let left_out = format!("30 lines more than {OTHER_LINES_MAX} in {LINES_SECONDS} s were not logged");
        assert_eq!(lines[lines.len() - 3..], ["a block moved", &left_out, "refused again"]);
    }

    #[test]
    fn a_line_of_json_has_an_event_s_parts_or_a_message() {
        let json = |record: &Record<'_>| {
            let mut out = Vec::new();
            write_json(&mut out, record).unwrap();
            assert_eq!(out.pop(), Some(b'\n'));
            serde_json::from_slice::<serde_json::Value>(&out).unwrap()
        };
        let line = json(&Record::builder().level(log::Level::Warn).args(format_args!("two\nlines")).build());
        assert_eq!((&line["level"], &line["message"]), (&"warn".into(), &"two\nlines".into()));
        assert!(line.get("event").is_none());
        let pairs = [
            ("volume", Value::from("d")),
            ("event", Value::from("remapped")),
            ("device", Value::from("")),
            ("sector", Value::from(8_u64)),
            ("sectors", Value::from(8_u64)),
            ("cause", Value::from("\"EIO\"")),
            ("action", Value::from("moved")),
        ];
        let line = json(&Record::builder().level(log::Level::Error).args(format_args!("x")).key_values(&pairs).build());
        let time = line["time"].as_str().unwrap().to_owned();
        assert_eq!(
            line,
            serde_json::json!({"time": time, "level": "error", "volume": "d", "event": "remapped", "sector": 8,
                "sectors": 8, "cause": "\"EIO\"", "action": "moved"})
        );
    }
}
