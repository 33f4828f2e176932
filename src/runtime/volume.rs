//! Making volumes, and opening one for service.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::counters::Counters;
use super::devices::{Devices, facts, is_block_device, is_file};
use super::eventlog::EventLog;
use super::handle::{Cleared, FrontEndState, Served, VolumeHandle};
use super::healer::{HealerSetup, HealerThread, StartError, drive};
use super::load::{LoadMeter, Zone};
use super::mailbox::mailbox;
use super::options::{AdoptOptions, Cache, CreateOptions, FailOrHold, ServeOptions, VolumeShape};
use super::scan_options::{ScanOptions, Window};
use super::signature::{Content, Found, format_of, look};
use super::worker::{Clock, DiskInfo, WorkerPort};
use crate::device::fault::FaultTable;
use crate::device::open::{self, DeviceSet, OpenDevice, OpenOptions, create_file, same_file};
use crate::device::{Completion, DeviceIndex, Errno, Op, Reactor};
use crate::engine::create::{CreateParams, Creation};
use crate::engine::event::{Event, EventKind, Severity};
use crate::engine::healer::{HealerParams, OnLoss, Order, Policy, Reply};
use crate::engine::open::{DeviceFacts, LabelSearch, OldLabel, OpenError, OpenParams, Opening};
use crate::engine::scan::ScanParams;
use crate::engine::shard::Shard;
use crate::runtime::options::IoEngine;
use crate::sync::Mutex;
use crate::units::{SECTOR_SIZE, SectorRange, Time};
use crate::volume::layout::{label_size, spare_size};
use crate::volume::superblock::{CAPACITY_MAX, CloseStamp};

/// Nobody hands a device over to `create` or `adopt`, but udev may be looking at one that just came, and a server that
/// has just ended may not be gone.
const MAKE_LOCK_WAIT: Duration = Duration::from_secs(5);
/// `hold` without a number waits for the operator: a year is as good as for ever.
const HOLD_FOR_EVER_SECONDS: u64 = 365 * 24 * 3600;
/// How long a close may take on each of its two steps before the volume is left as after a crash.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why no volume was made or opened: one line that names the device, the number and what to do.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// A device cannot be used.
    #[error(transparent)]
    Device(#[from] open::OpenError),
    /// The volume was refused; names the pair it is about.
    #[error("{}: {error}", pair(primary, spare.as_deref()))]
    Volume {
        /// The primary.
        primary: PathBuf,
        /// The spare, if there is to be one.
        spare: Option<PathBuf>,
        /// The reason.
        error: OpenError,
    },
    /// Anything else.
    #[error("{0}")]
    Refused(String),
    /// The host refused something.
    #[error("{0}")]
    Host(#[from] io::Error),
}

fn pair(primary: &Path, spare: Option<&Path>) -> String {
    let spare = spare.map_or_else(String::new, |spare| format!(" with spare {}", spare.display()));
    format!("{}{spare}", primary.display())
}

fn refused<T>(line: String) -> Result<T, MakeError> {
    Err(MakeError::Refused(line))
}

/// What was changed on the way to a volume, to be undone unless it is finished.
#[derive(Default)]
struct Made(Vec<Step>);

enum Step {
    File(PathBuf),
    /// An empty file that was extended, and when it had last been changed.
    Extended(PathBuf, SystemTime),
}

impl Made {
    fn file(&mut self, path: &Path, size: u64) -> Result<(), MakeError> {
        create_file(path, size)?;
        self.0.push(Step::File(path.to_owned()));
        Ok(())
    }

    fn extend(&mut self, path: &Path, size: u64) -> Result<(), MakeError> {
        let failed = |error| open::open_failure(path, error);
        let modified = fs::metadata(path).and_then(|meta| meta.modified()).map_err(failed)?;
        let file = fs::OpenOptions::new().write(true).open(path).map_err(failed)?;
        self.0.push(Step::Extended(path.to_owned(), modified));
        file.set_len(size).map_err(|error| match error.raw_os_error() {
            Some(libc::EFBIG | libc::EINVAL) => open::OpenError::TooLarge { path: path.to_owned(), size },
            _ => open::io_failure(path, "cannot be extended", error),
        })?;
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for step in &self.0 {
            // Where this fails too, what is left says at the next try that it is not empty.
            let _ = match step {
                Step::File(path) => fs::remove_file(path),
                Step::Extended(path, modified) => File::options().write(true).open(path).and_then(|file| {
                    file.set_len(0)?;
                    file.set_modified(*modified)
                }),
            };
        }
    }
}

/// Make a volume on an empty primary; the answer is one line for a person.
///
/// # Errors
/// When a device is not fit, or cannot be written.
pub fn create(options: &CreateOptions) -> Result<String, MakeError> {
    let CreateOptions { primary, spare, size, shape, force } = options;
    let label = label_size(shape.max_remaps);
    let needed = size.checked_next_multiple_of(4096).and_then(|size| size.checked_add(label));
    let Some(needed) = needed.filter(|needed| i64::try_from(*needed).is_ok()) else {
        return refused(format!("{}: {size} bytes is too large for a disk; choose a smaller size", primary.display()));
    };
    check_capacity(primary, size / SECTOR_SIZE)?;
    // Everything that can be seen without writing comes before the first write.
    check_two_devices(primary, spare)?;
    let found = if exists(primary)? { Some(look(primary)?) } else { None };
    if let Some(found) = found.as_ref().filter(|found| found.content.is_some() || found.size > 0) {
        check_no_label(primary)?;
        check_new_primary(primary, found, *size, needed)?;
    }
    check_new_spare(spare, shape, *force)?;
    let mut made = Made::default();
    match found.map(|found| found.size) {
        None => made.file(primary, needed)?,
        Some(0) if !is_block_device(primary) => made.extend(primary, needed)?,
        Some(_) => {}
    }
    let device = Arc::new(open::open(primary, &make_options())?);
    let line = make(device, None, spare, Some(size / SECTOR_SIZE), shape, &mut made)?;
    made.0.clear();
    Ok(line)
}

/// Make a volume around an existing image; the answer is one line for a person.
///
/// # Errors
/// When a device is not fit, or the spare cannot be written.
pub fn adopt(options: &AdoptOptions) -> Result<String, MakeError> {
    let AdoptOptions { primary, spare, shape, force } = options;
    check_two_devices(primary, spare)?;
    if !exists(primary)? {
        return Err(open::OpenError::Missing { path: primary.to_owned() }.into());
    }
    refuse_image(primary, format_of(primary))?;
    let (device, label) = open_to_adopt(primary, *force)?;
    check_new_spare(spare, shape, *force)?;
    let mut made = Made::default();
    let line = make(device, label, spare, None, shape, &mut made)?;
    made.0.clear();
    Ok(line)
}

fn make_options() -> OpenOptions {
    OpenOptions { lock_wait: MAKE_LOCK_WAIT, ..OpenOptions::default() }
}

/// Open a primary that is not to be changed by a byte, unless it carries the label of a volume: that is refused,
/// or is to be destroyed where the operator wants it so.
fn open_to_adopt(primary: &Path, force: bool) -> Result<(Arc<OpenDevice>, Option<OldLabel>), MakeError> {
    let open = |read_only| -> Result<_, MakeError> {
        let device = Arc::new(open::open(primary, &OpenOptions { read_only, ..make_options() })?);
        let label = label_of(primary, &device)?;
        Ok((device, label))
    };
    let (device, label) = open(true)?;
    let Some(label) = label else { return Ok((device, None)) };
    if force {
        drop(device);
        return open(false);
    }
    let list = match label.remapped {
        Some(blocks) => {
            format!("its list of {} has {blocks} remapped blocks, whose newest data is", date(label.stamped))
        }
        None => "its list of remapped blocks is not whole, and their newest data is".to_owned(),
    };
    refused(format!(
        "{}; {list} on its spare: serve it with that, or --force to lose what the spare holds",
        belongs(primary, &label)
    ))
}

fn belongs(primary: &Path, label: &OldLabel) -> String {
    format!("{}: is the primary of vhost-remap volume {}, made {}", primary.display(), label.set, date(label.created))
}

/// The label of a volume on a primary that is open.
fn label_of(primary: &Path, device: &Arc<OpenDevice>) -> Result<Option<OldLabel>, MakeError> {
    // Not a ring, which keeps the device's lock for a moment after it has gone.
    let mut reactor = Devices::new(DeviceSet::new(vec![device.clone()]), IoEngine::Threads, None)?.reactor()?;
    let mut search = LabelSearch::new(facts(device));
    let found = run_script(&mut *reactor, |now, completions, ops| {
        search.step(now, completions, ops);
        search.result()
    });
    found.map_err(|error| MakeError::Volume { primary: primary.to_owned(), spare: None, error })
}

/// Drive a script to its result.
pub(super) fn run_script<T>(
    reactor: &mut dyn Reactor,
    mut step: impl FnMut(Time, &[Completion], &mut Vec<Op>) -> Option<T>,
) -> T {
    let mut result = None;
    drive(reactor, &Clock::start(), |now, completions, ops| {
        let ended = step(now, completions, ops);
        result = result.take().or(ended);
        result.is_some()
    });
    result.expect("driven to its end")
}

/// Refuse a new volume on the primary of another. What cannot be looked at has not been refused for that, unless it is
/// in use; a server that has just ended can keep its devices for a moment longer.
fn check_no_label(primary: &Path) -> Result<(), MakeError> {
    let device = match open::open(primary, &OpenOptions { read_only: true, ..make_options() }) {
        Ok(device) => device,
        Err(in_use @ open::OpenError::InUse { .. }) => return Err(in_use.into()),
        Err(_) => return Ok(()),
    };
    match label_of(primary, &Arc::new(device)) {
        Ok(Some(label)) => {
            refused(format!("{}: serve it with its spare, or wipe it first to lose it", belongs(primary, &label)))
        }
        Ok(None) | Err(_) => Ok(()),
    }
}

fn check_capacity(primary: &Path, capacity: u64) -> Result<(), MakeError> {
    if capacity <= CAPACITY_MAX {
        return Ok(());
    }
    let (size, path) = (capacity.saturating_mul(SECTOR_SIZE), primary.display());
    refused(format!("{path}: {size} bytes is more than a volume can have; choose a size below 4096T"))
}

/// Whether there is anything; where there is not, there must be a directory for it.
fn exists(path: &Path) -> Result<bool, MakeError> {
    match open::kind_of(path) {
        Ok(_) => Ok(true),
        // No file can have that name.
        Err(open::OpenError::Missing { .. }) if path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            Err(open::OpenError::Directory { path: path.to_owned() }.into())
        }
        Err(open::OpenError::Missing { .. }) if open::parent_of(path).is_dir() => Ok(false),
        Err(open::OpenError::Missing { .. }) => {
            let directory = open::parent_of(path).to_owned();
            Err(open::OpenError::NoDirectory { path: path.to_owned(), directory }.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn check_two_devices(primary: &Path, spare: &Path) -> Result<(), MakeError> {
    if !same_file(primary, spare) {
        return Ok(());
    }
    refused(format!("{}: is the primary itself; name another spare", spare.display()))
}

/// A primary that exists must be empty and large enough.
fn check_new_primary(primary: &Path, found: &Found, size: u64, needed: u64) -> Result<(), MakeError> {
    let path = primary.display();
    if let Some(content) = found.content {
        refuse_image(primary, found.content)?;
        let name = content.name();
        return refused(format!("{path}: is not empty ({name}); `adopt` keeps its content, or wipe it first"));
    }
    if found.size < needed {
        let has = found.size;
        return refused(format!(
            "{path}: has {has} bytes, and a disk of {size} with its label needs {needed}; choose a smaller --size"
        ));
    }
    Ok(())
}

/// A spare that exists must be large enough and must not look like somebody else's.
fn check_new_spare(spare: &Path, shape: &VolumeShape, force: bool) -> Result<(), MakeError> {
    if !exists(spare)? {
        return Ok(());
    }
    let found = look(spare)?;
    let (path, needed, remaps) = (spare.display(), spare_size(shape.max_remaps), shape.max_remaps);
    if found.size == 0 && !is_block_device(spare) {
        return refused(format!(
            "{path}: has 0 bytes; remove it so that it is made, or extend it: truncate -s {needed} {path}"
        ));
    }
    match found.content {
        Some(content) if !force => {
            let name = content.name();
            refused(format!("{path}: is not empty ({name}); name another spare, or --force to lose what it holds"))
        }
        _ if found.size < needed => refused(format!(
            "{path}: has {} bytes, and {remaps} remaps need {needed}; use a larger one, or fewer with --max-remaps",
            found.size
        )),
        _ => Ok(()),
    }
}

/// Image formats are not disks: what the guest would see is their headers.
fn refuse_image(primary: &Path, content: Option<Content>) -> Result<(), MakeError> {
    let Some(Content::Image(format, name)) = content else { return Ok(()) };
    let path = primary.display();
    refused(format!(
        "{path}: is {name}, not a raw disk; convert it: qemu-img convert -f {format} -O raw {path} {path}.raw"
    ))
}

/// Make the volume: a capacity means a label at the primary's end, none means the primary is adopted.
fn make(
    primary_device: Arc<OpenDevice>,
    old_label: Option<OldLabel>,
    spare: &Path,
    capacity: Option<u64>,
    shape: &VolumeShape,
    made: &mut Made,
) -> Result<String, MakeError> {
    let adopting = capacity.is_none();
    let primary = &primary_device.path.clone();
    let spare_bytes = spare_size(shape.max_remaps);
    if !spare.exists() {
        made.file(spare, spare_bytes)?;
    }
    let spare_device = open::open(spare, &make_options())?;
    let set = Uuid::new_v4();
    let params = CreateParams {
        primary: facts(&primary_device),
        spare: facts(&spare_device),
        capacity: capacity.unwrap_or(primary_device.size() / SECTOR_SIZE),
        labelled: !adopting,
        max_remaps: shape.max_remaps,
        set,
        devices: [Uuid::new_v4(), Uuid::new_v4()],
        serial: serial(shape, set)?,
        now: seconds_since_epoch(),
    };
    let capacity = params.capacity;
    check_capacity(primary, capacity)?;
    let devices = DeviceSet::new(vec![primary_device, Arc::new(spare_device)]);
    let mut reactor = Devices::new(devices, IoEngine::Auto, None)?.reactor()?;
    let primary_is = match (adopting, &old_label) {
        (false, _) => String::new(),
        (true, None) => ", primary adopted unchanged".to_owned(),
        (true, Some(label)) => format!(", primary adopted, the label of its volume {} destroyed", label.set),
    };
    let mut creation = match old_label {
        Some(label) => Creation::replacing(params, label),
        None => Creation::new(params),
    };
    let created = run_script(&mut *reactor, |now, completions, ops| {
        creation.step(now, completions, ops);
        creation.result()
    });
    created.map_err(|error| match error {
        OpenError::Io { device, errno: Errno(libc::ENOSPC | libc::EDQUOT), .. } => {
            let (path, size) = match device {
                DeviceIndex::PRIMARY => (primary.to_owned(), label_size(shape.max_remaps)),
                _ => (spare.to_owned(), spare_bytes),
            };
            open::OpenError::NoSpace { path, size }.into()
        }
        error => MakeError::Volume { primary: primary.to_owned(), spare: Some(spare.to_owned()), error },
    })?;
    Ok(format!(
        "{}: volume {set}: {capacity} sectors ({} MiB), spare {} with {} slots{primary_is}",
        primary.display(),
        capacity / 2048,
        spare.display(),
        shape.max_remaps
    ))
}

fn serial(shape: &VolumeShape, set: Uuid) -> Result<[u8; 20], MakeError> {
    let text = shape.serial.clone().unwrap_or_else(|| set.simple().to_string()[..20].to_owned());
    let mut serial = [0; 20];
    match serial.get_mut(..text.len()) {
        Some(place) => place.copy_from_slice(text.as_bytes()),
        None => return refused(format!("--serial {text}: {} bytes, and 20 are possible", text.len())),
    }
    Ok(serial)
}

fn seconds_since_epoch() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// What of a served volume stays while it is handed over and taken again.
pub struct Standing {
    /// The clock of its events.
    pub(super) clock: Clock,
    /// Seconds since the epoch at the clock's start.
    pub(super) epoch: u64,
    /// Its events.
    pub(super) log: Arc<EventLog>,
    /// Rules of fault injection, where that is on.
    pub(super) faults: Option<Arc<FaultTable>>,
    /// Whom to ask about the front-end.
    pub(super) front_end: OnceLock<Box<dyn Fn() -> FrontEndState + Send + Sync>>,
    /// Whom to tell how many sectors a disk has that has grown.
    pub(super) announce: OnceLock<Box<dyn Fn(u64) + Send + Sync>>,
    /// What its threads count.
    pub(super) counters: Counters,
    /// For times of day.
    pub(super) zone: Zone,
}

impl Standing {
    /// At the start of a server.
    pub fn new(options: &ServeOptions, workers: u32) -> Standing {
        let epoch = seconds_since_epoch();
        let (zone, unknown) = Zone::system();
        if let Some(why) = unknown.filter(|_| options.scan.window != Window::default()) {
            log::warn!("--scan-window: taken as UTC, as the system's time zone is not known: {why}; set TZ");
        }
        Standing {
            clock: Clock::start(),
            epoch,
            log: Arc::new(EventLog::new(options.primary.display().to_string(), epoch as f64)),
            faults: options.fault_injection.then(|| Arc::new(FaultTable::new())),
            front_end: OnceLock::new(),
            announce: OnceLock::new(),
            counters: Counters::new(workers),
            zone,
        }
    }
}

/// A volume that is open, with its healer at work.
pub struct ServedVolume {
    healer: HealerThread,
    handle: VolumeHandle,
    ports: Vec<WorkerPort>,
    disk: Arc<DiskInfo>,
    passthrough: bool,
}

/// The primary, and the spare where there is one, making both first where `options` say so.
fn open_devices(options: &ServeOptions) -> Result<Vec<Arc<OpenDevice>>, MakeError> {
    // A volume that was just made would be left behind.
    Devices::check_engine(options.io_engine)?;
    let spare = options.spare.as_ref().filter(|_| !options.passthrough);
    if let Some(spare) = spare {
        check_two_devices(&options.primary, spare)?;
        if let Some(make) = &options.create {
            create_if_absent(options, spare, make.size, &make.shape)?;
        }
        check_spare_exists(&options.primary, spare)?;
    }
    let open_options = OpenOptions {
        read_only: options.read_only || options.degraded,
        direct: options.cache == Cache::None,
        lock_wait: options.lock_wait,
    };
    let mut devices = vec![Arc::new(open::open(&options.primary, &open_options)?)];
    if let Some(spare) = spare {
        // Metadata is always written with O_DIRECT, whatever the guest's data is.
        let device = Arc::new(open::open(spare, &OpenOptions { direct: true, ..open_options.clone() })?);
        devices.push(device);
    }
    Ok(devices)
}

/// Open the volume that `options` name, making it first where they say so.
///
/// # Errors
/// When it cannot be opened: one line that says why.
pub fn open_volume(options: &ServeOptions, workers: u32, standing: &Arc<Standing>) -> Result<ServedVolume, MakeError> {
    let devices = open_devices(options)?;
    let devices = Devices::new(DeviceSet::new(devices), options.io_engine, standing.faults.clone())?;
    let opening = opening(options, &devices);
    let Standing { clock, epoch, log, counters, .. } = &**standing;
    let (clock, epoch) = (*clock, *epoch);
    let (mut to_shards, mut inboxes) = (Vec::new(), Vec::new());
    for _ in 0..workers {
        let (to_shard, inbox) = mailbox()?;
        to_shards.push(to_shard);
        inboxes.push(inbox);
    }
    let primary = devices.get(DeviceIndex::PRIMARY).expect("there is always a primary");
    let scan = scan_params(options, is_file(primary));
    let params = HealerParams { shards: inboxes.len(), policy: policy(options), epoch, scan: scan.clone() };
    let mut meter = LoadMeter::new(counters.clone(), standing.zone.clone(), epoch);
    let setup = HealerSetup {
        devices: devices.clone(),
        opening,
        params,
        clock,
        log: log.clone(),
        shards: to_shards,
        counters: counters.healer.clone(),
        load: Box::new(move |now| meter.measure(now)),
    };
    let (healer, opened) = HealerThread::start(setup).map_err(|error| match error {
        StartError::Open(error) => {
            MakeError::Volume { primary: options.primary.clone(), spare: options.spare.clone(), error }
        }
        StartError::Host(error) => MakeError::Host(error),
    })?;
    if let Some(stamped) = opened.facts.degraded {
        log.push(degraded_event(stamped, epoch));
    }
    let disk = Arc::new(DiskInfo {
        capacity: opened.progress.capacity.clone(),
        logical_block_size: opened.geometry.logical_block,
        read_only: opened.facts.read_only,
        serial: opened.facts.serial,
    });
    let ports = inboxes
        .into_iter()
        .enumerate()
        .map(|(index, inbox)| {
            let devices = devices.clone();
            WorkerPort {
                reactor: Box::new(move || devices.reactor()),
                shard: Shard::new(index, opened.view.clone(), opened.progress.clone()),
                inbox,
                healer: healer.shards.clone(),
                clock,
                disk: disk.clone(),
                log: log.clone(),
                polling: Duration::from_micros(options.polling_us(workers).into()),
                counters: counters.workers[index].clone(),
            }
        })
        .collect();
    let handle = VolumeHandle(Arc::new(Served {
        orders: healer.orders.clone(),
        devices,
        opened,
        standing: standing.clone(),
        cache: options.cache.name(),
        workers,
        polling_us: options.polling_us(workers),
        transport: options.transport.name(),
        scan,
        resizing: Mutex::new(()),
        cleared: Mutex::new(Cleared::at(standing.epoch + clock.now().0 / 1_000_000_000, counters.latency().sum_ns)),
    }));
    Ok(ServedVolume { healer, handle, ports, disk, passthrough: options.passthrough })
}

fn opening(options: &ServeOptions, devices: &Devices) -> Box<dyn FnOnce() -> Opening + Send> {
    let primary = facts(devices.get(DeviceIndex::PRIMARY).expect("there is always a primary"));
    let (read_only, accept_external) = (options.read_only, options.accept_external);
    match devices.get(DeviceIndex::SPARE).map(|spare| facts(spare)) {
        Some(spare) => {
            let params = OpenParams { primary, spare, read_only, accept_external };
            Box::new(move || Opening::new(params))
        }
        None if options.degraded => Box::new(move || Opening::degraded(primary)),
        None => {
            let serial = passthrough_serial(&primary);
            Box::new(move || Opening::passthrough(&primary, serial, read_only))
        }
    }
}

/// What a guest is told of a disk that has no serial number of its own.
pub(super) fn passthrough_serial(primary: &DeviceFacts) -> [u8; 20] {
    let mut serial = [0; 20];
    let name = format!("passthrough-{:x}", primary.inode);
    let len = name.len().min(20);
    serial[..len].copy_from_slice(&name.as_bytes()[..len]);
    serial
}

/// Served without its spare since the label's list of remapped blocks was written at `stamped`.
fn degraded_event(stamped: u64, now: u64) -> Event {
    Event {
        time: Time(0),
        severity: Severity::Error,
        kind: EventKind::Degraded,
        device: Some(DeviceIndex::SPARE),
        range: SectorRange::default(),
        cause: "served without it".into(),
        action: format!("read-only; {}", degraded_list(stamped, now)),
    }
}

/// Seconds since the epoch, for a person.
fn date(seconds: u64) -> impl std::fmt::Display {
    // What lies on a disk may be any number, and a date has four digits for the year.
    const LAST: u64 = 253_402_300_799;
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds.min(LAST)))
}

/// How far a label's list can be trusted that was written at `stamped`.
pub(super) fn degraded_list(stamped: u64, now: u64) -> String {
    let date = date(stamped);
    let age = humantime::format_duration(Duration::from_secs(now.saturating_sub(stamped)));
    format!("blocks remapped by {date} ({age} ago) fail; those remapped later may read as old data")
}

fn policy(options: &ServeOptions) -> Policy {
    let on_loss = |choice| match choice {
        FailOrHold::Fail => OnLoss::Fail,
        FailOrHold::Hold(time) => OnLoss::Hold(time.map_or(HOLD_FOR_EVER_SECONDS, |time| time.as_secs())),
    };
    Policy {
        primary_gone: on_loss(options.on_device_loss),
        spare_full: on_loss(options.on_spare_full),
        passthrough: options.passthrough,
    }
}

fn scan_params(options: &ServeOptions, primary_is_file: bool) -> ScanParams {
    let ScanOptions { interval: _, rate, window, move_weak } = options.scan;
    ScanParams {
        interval: options.scan_interval().map(|time| time.as_secs()),
        rate,
        window,
        move_weak: move_weak.applies(primary_is_file),
    }
}

/// `serve --create`: only where neither primary nor spare exists is a volume made.
fn create_if_absent(options: &ServeOptions, spare: &Path, size: u64, shape: &VolumeShape) -> Result<(), MakeError> {
    let primary = &options.primary;
    match (exists(primary)?, exists(spare)?) {
        // The missing one of a pair is not made anew.
        (true, _) => Ok(()),
        (false, true) => refused(format!(
            "{}: missing, and its spare {} exists: bring the primary back, or remove the spare too",
            primary.display(),
            spare.display()
        )),
        (false, false) => {
            let (primary, spare) = (primary.clone(), spare.to_owned());
            let line = create(&CreateOptions { primary, spare, size, shape: shape.clone(), force: false })?;
            log::info!("{line}");
            Ok(())
        }
    }
}

/// A primary without its spare: it may have lost it, or never had one.
fn check_spare_exists(primary: &Path, spare: &Path) -> Result<(), MakeError> {
    if !exists(primary)? {
        return Err(open::OpenError::Missing { path: primary.to_owned() }.into());
    }
    if exists(spare)? {
        return Ok(());
    }
    if fs::metadata(primary).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
        return Err(open::OpenError::Empty { path: primary.to_owned() }.into());
    }
    refuse_image(primary, format_of(primary))?;
    refused(format!(
        "{}: missing, and {} exists: bring the spare back; or read what the primary holds with `serve --degraded`; or, if it \
         never had one, `adopt` it",
        spare.display(),
        primary.display()
    ))
}

impl ServedVolume {
    /// For operators.
    pub fn handle(&self) -> VolumeHandle {
        self.handle.clone()
    }

    /// Its generation before it was opened.
    pub(super) fn found_generation(&self) -> u64 {
        self.handle.0.opened.facts.found_generation
    }

    /// See [`VolumeFacts::closed_write_through`](crate::engine::open::VolumeFacts::closed_write_through).
    pub(super) fn closed_write_through(&self) -> Option<bool> {
        self.handle.0.opened.facts.closed_write_through
    }

    /// What the guest is told of the disk.
    pub fn disk(&self) -> Arc<DiskInfo> {
        self.disk.clone()
    }

    /// The workers' places, one for each. Once.
    pub fn take_ports(&mut self) -> Vec<WorkerPort> {
        std::mem::take(&mut self.ports)
    }

    /// Close cleanly: everything durable, then the stamp that says so, and whether the guest's cache was switched to
    /// write-through. To be called when no worker runs any more.
    ///
    /// # Errors
    /// When a device does not take it; the volume is then as after a crash, which loses nothing.
    pub fn close(self, write_through: bool) -> Result<(), MakeError> {
        if self.disk.read_only || self.passthrough {
            return Ok(());
        }
        let path = self.handle.0.devices.get(DeviceIndex::PRIMARY).expect("there is always a primary").path.clone();
        let left = |why: String| {
            MakeError::Refused(format!(
                "{}: not closed cleanly: {why}; the next start checks and repairs",
                path.display()
            ))
        };
        let sample_crc = match self.handle.ask(Order::Settle, CLOSE_TIMEOUT) {
            Some(Reply::Settled(result)) => result.map_err(left)?,
            _ => return Err(left(format!("no answer for {} s", CLOSE_TIMEOUT.as_secs()))),
        };
        let primary = self.handle.0.devices.get(DeviceIndex::PRIMARY).expect("there is always a primary");
        let mtime = primary.mtime_ns_now().map_err(|errno| left(errno.to_string()))?;
        let mtime_ns = if is_file(primary) { u64::try_from(mtime).unwrap_or(0) } else { 0 };
        let stamp = CloseStamp { size: primary.size(), mtime_ns, sample_crc, write_through };
        match self.handle.ask(Order::Seal(stamp), CLOSE_TIMEOUT) {
            Some(Reply::Done(result)) => result.map(drop).map_err(left)?,
            _ => return Err(left(format!("no answer for {} s", CLOSE_TIMEOUT.as_secs()))),
        }
        drop(self.healer);
        Ok(())
    }
}
