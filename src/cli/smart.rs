//! What drives say of themselves: `smartctl --json --all`, run by whoever asks, never by the server.
//!
//! Shown is what is known to go before failures: for ATA the attributes 5, 187, 188, 197 and 198, for NVMe the
//! critical warning, spare, wear and media errors (NVM Express 2.0 §5.16.1.3), for SCSI the grown defects. The names
//! are those of smartctl(8)'s JSON, format version 1.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

use crate::runtime::health::DeviceHealth;

/// ATA attributes that are worth a look when they are not zero.
const ATA_ATTRIBUTES: [u8; 5] = [5, 187, 188, 197, 198];

/// Bits of smartctl's exit status that mean that it got no answer: a wrong command line, a device that does not open.
const NO_ANSWER: i32 = 0b11;

/// One drive, as it sees itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct DriveView {
    /// Which of our devices lie on it.
    pub(super) under: Vec<String>,
    /// Its device node; empty where none was found.
    pub(super) device: String,
    /// Why there is no view of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unavailable: Option<String>,
    pub(super) model: Option<String>,
    /// Its own verdict.
    pub(super) passed: Option<bool>,
    pub(super) temperature_celsius: Option<i64>,
    pub(super) power_on_hours: Option<u64>,
    pub(super) values: Vec<DriveValue>,
}

/// A number the drive gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct DriveValue {
    pub(super) name: String,
    pub(super) value: String,
    /// Whether a healthy drive has another one.
    pub(super) notable: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    smartctl: Smartctl,
    model_name: Option<String>,
    scsi_model_name: Option<String>,
    smart_status: Option<SmartStatus>,
    temperature: Option<Temperature>,
    power_on_time: Option<PowerOnTime>,
    ata_smart_attributes: Option<AtaAttributes>,
    nvme_smart_health_information_log: Option<NvmeLog>,
    scsi_grown_defect_list: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Smartctl {
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    string: String,
}

#[derive(Deserialize)]
struct SmartStatus {
    passed: Option<bool>,
}

#[derive(Deserialize)]
struct Temperature {
    current: Option<i64>,
}

#[derive(Deserialize)]
struct PowerOnTime {
    hours: Option<u64>,
}

#[derive(Deserialize)]
struct AtaAttributes {
    #[serde(default)]
    table: Vec<AtaAttribute>,
}

#[derive(Deserialize)]
struct AtaAttribute {
    id: u8,
    name: String,
    /// `now` or `past` where the attribute is or was below its threshold.
    #[serde(default)]
    when_failed: String,
    raw: AtaRaw,
}

#[derive(Deserialize)]
struct AtaRaw {
    value: u64,
    string: String,
}

#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct NvmeLog {
    critical_warning: u64,
    available_spare: Option<u64>,
    available_spare_threshold: Option<u64>,
    percentage_used: u64,
    media_errors: u64,
}

/// The drives under the devices of a volume, or those that were named.
pub(super) fn views(devices: &[DeviceHealth], named: &[PathBuf]) -> Vec<DriveView> {
    let mut drives: Vec<(Vec<String>, Result<PathBuf, String>)> = Vec::new();
    if named.is_empty() {
        for device in devices {
            let role = format!("{} {}", device.role, device.path);
            let drive = drive_under(Path::new(&device.path));
            match drives.iter_mut().find(|(_, known)| drive.is_ok() && *known == drive) {
                Some((under, _)) => under.push(role),
                None => drives.push((vec![role], drive)),
            }
        }
    } else {
        drives.extend(named.iter().map(|drive| (Vec::new(), Ok(drive.clone()))));
    }
    drives
        .into_iter()
        .map(|(under, drive)| match drive {
            Ok(path) => DriveView { under, device: path.display().to_string(), ..ask(&path) },
            Err(why) => DriveView { under, unavailable: Some(why), ..DriveView::default() },
        })
        .collect()
}

/// The block device itself, or the one whose file system has the file; of a partition, the whole disk.
fn drive_under(path: &Path) -> Result<PathBuf, String> {
    let meta = fs::metadata(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let number = if meta.file_type().is_block_device() { meta.rdev() } else { meta.dev() };
    let link = format!("/sys/dev/block/{}:{}", major(number), minor(number));
    let none = || format!("{}: lies on no drive of its own; name one with --smart-device", path.display());
    let sys = fs::canonicalize(link).map_err(|_| none())?;
    let disk = if sys.join("partition").exists() { sys.parent() } else { Some(&*sys) };
    let name = disk.and_then(Path::file_name).ok_or_else(none)?;
    // Slashes in names of devices are exclamation marks there.
    Ok(Path::new("/dev").join(name.to_string_lossy().replace('!', "/")))
}

fn ask(drive: &Path) -> DriveView {
    view_of(&run("smartctl".as_ref(), drive))
}

/// What `smartctl` printed; why there is nothing.
fn run(program: &OsStr, drive: &Path) -> Result<(Option<i32>, Vec<u8>), String> {
    let output = Command::new(program).args(["--json", "--all"]).arg(drive).stdin(Stdio::null()).output();
    match output {
        Ok(output) => Ok((output.status.code(), output.stdout)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err("smartctl is not installed; it is part of smartmontools".to_owned())
        }
        Err(error) => Err(format!("smartctl cannot be run: {error}")),
    }
}

fn view_of(output: &Result<(Option<i32>, Vec<u8>), String>) -> DriveView {
    let none = |why: String| DriveView { unavailable: Some(why), ..DriveView::default() };
    let (status, stdout) = match output {
        Ok(output) => output,
        Err(why) => return none(why.clone()),
    };
    let Ok(answer) = serde_json::from_slice::<Answer>(stdout) else {
        return none("smartctl gave no JSON; version 7.0 or later is needed".to_owned());
    };
    if status.is_none_or(|status| status & NO_ANSWER != 0) {
        let said: Vec<&str> = answer.smartctl.messages.iter().map(|message| message.string.trim()).collect();
        let why = if said.is_empty() { "no reason given".to_owned() } else { said.join("; ") };
        return none(format!("smartctl got no answer: {why}"));
    }
    DriveView {
        model: answer.model_name.clone().or_else(|| answer.scsi_model_name.clone()),
        passed: answer.smart_status.as_ref().and_then(|status| status.passed),
        temperature_celsius: answer.temperature.as_ref().and_then(|temperature| temperature.current),
        power_on_hours: answer.power_on_time.as_ref().and_then(|time| time.hours),
        values: values(&answer),
        ..DriveView::default()
    }
}

fn values(answer: &Answer) -> Vec<DriveValue> {
    let mut values = Vec::new();
    let mut push = |name: &str, value: String, notable| values.push(DriveValue { name: name.into(), value, notable });
    for attribute in answer.ata_smart_attributes.iter().flat_map(|attributes| &attributes.table) {
        let failed = !attribute.when_failed.is_empty();
        if ATA_ATTRIBUTES.contains(&attribute.id) || failed {
            let name = format!("{} {}", attribute.id, attribute.name);
            push(&name, attribute.raw.string.clone(), failed || attribute.raw.value > 0);
        }
    }
    if let Some(log) = &answer.nvme_smart_health_information_log {
        push("critical warning", log.critical_warning.to_string(), log.critical_warning != 0);
        if let Some(spare) = log.available_spare {
            let threshold = log.available_spare_threshold.unwrap_or(0);
            push("available spare", format!("{spare} % (threshold {threshold} %)"), spare <= threshold);
        }
        push("percentage used", format!("{} %", log.percentage_used), log.percentage_used >= 100);
        push("media errors", log.media_errors.to_string(), log.media_errors > 0);
    }
    if let Some(grown) = answer.scsi_grown_defect_list {
        push("grown defects", grown.to_string(), grown > 0);
    }
    values
}

/// Lines for a person.
pub(super) fn text(drive: &DriveView) -> String {
    let mut out = String::new();
    let under = drive.under.join(", ");
    let head = match (drive.device.as_str(), under.as_str()) {
        ("", under) => under.to_owned(),
        (device, "") => device.to_owned(),
        (device, under) => format!("{device} (under {under})"),
    };
    if let Some(why) = &drive.unavailable {
        return format!("{head}: no view: {why}\n");
    }
    let verdict = match drive.passed {
        Some(true) => "passed",
        Some(false) => "FAILED: it expects to fail soon; replace it",
        None => "no verdict",
    };
    let _ = write!(out, "{head}: {verdict}");
    if let Some(model) = &drive.model {
        let _ = write!(out, ", {model}");
    }
    if let Some(hours) = drive.power_on_hours {
        let _ = write!(out, ", {hours} h in use");
    }
    if let Some(celsius) = drive.temperature_celsius {
        let _ = write!(out, ", {celsius} °C");
    }
    out.push('\n');
    for value in &drive.values {
        let mark = if value.notable { '!' } else { ' ' };
        let _ = writeln!(out, "  {mark} {}: {}", value.name, value.value);
    }
    out
}

#[cfg(test)]
mod tests;
