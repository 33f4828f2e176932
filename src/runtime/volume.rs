//! Making volumes, and opening one for service.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::devices::{Devices, facts, is_block_device, is_file};
use super::eventlog::EventLog;
use super::handle::{Served, VolumeHandle};
use super::healer::{HealerSetup, HealerThread, StartError, drive};
use super::mailbox::mailbox;
use super::options::{AdoptOptions, Cache, CreateOptions, FailOrHold, ServeOptions, VolumeShape};
use super::worker::{Clock, DiskInfo, WorkerPort};
use crate::device::DeviceIndex;
use crate::device::fault::FaultTable;
use crate::device::open::{self, DeviceSet, OpenOptions, create_file, same_file};
use crate::engine::create::{CreateParams, Creation};
use crate::engine::event::{Event, Severity};
use crate::engine::healer::{HealerParams, OnLoss, Order, Policy, Reply};
use crate::engine::open::{OpenError, OpenParams, Opening};
use crate::engine::shard::Shard;
use crate::runtime::options::IoEngine;
use crate::units::{SECTOR_SIZE, SectorRange, Time};
use crate::volume::layout::{label_size, spare_size};
use crate::volume::superblock::CloseStamp;

/// Bytes looked at, at each end, to decide whether a device is in use.
const LOOK_BYTES: u64 = 1 << 20;
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
    let spare = spare.map_or_else(String::new, |spare| format!(": {}", spare.display()));
    format!("{}{spare}", primary.display())
}

fn refused<T>(line: String) -> Result<T, MakeError> {
    Err(MakeError::Refused(line))
}

/// Files made on the way to a volume: removed again unless it is finished.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Made {
    fn file(&mut self, path: &Path, size: u64) -> Result<(), MakeError> {
        create_file(path, size)?;
        self.0.push(path.to_owned());
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
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
    let Some(needed) = needed else { return refused(format!("{}: {size} bytes is too large", primary.display())) };
    let mut made = Made::default();
    check_spare_path(spare)?;
    match fs::metadata(primary) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => made.file(primary, needed)?,
        Err(_) => {}
        Ok(meta) if meta.is_file() && meta.len() == 0 => {
            let file = fs::OpenOptions::new().write(true).open(primary);
            file.and_then(|file| file.set_len(needed))
                .map_err(|error| MakeError::Refused(format!("{}: {error}", primary.display())))?;
        }
        Ok(_) => {
            if let Some(what) = content_of(primary)? {
                return refused(format!(
                    "{}: is not empty ({what}); `adopt` keeps its content, or wipe it first",
                    primary.display()
                ));
            }
        }
    }
    let line = make(primary, spare, Some(size / SECTOR_SIZE), shape, *force, &mut made)?;
    made.0.clear();
    Ok(line)
}

/// Make a volume around an existing image; the answer is one line for a person.
///
/// # Errors
/// When a device is not fit, or the spare cannot be written.
pub fn adopt(options: &AdoptOptions) -> Result<String, MakeError> {
    let AdoptOptions { primary, spare, shape, force } = options;
    check_spare_path(spare)?;
    refuse_image_formats(primary)?;
    let mut made = Made::default();
    let line = make(primary, spare, None, shape, *force, &mut made)?;
    made.0.clear();
    Ok(line)
}

fn check_spare_path(spare: &Path) -> Result<(), MakeError> {
    let parent = spare.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.is_dir() {
        return Ok(());
    }
    refused(format!("{}: no such directory; make it or name another spare", parent.display()))
}

fn check_two_devices(primary: &Path, spare: &Path) -> Result<(), MakeError> {
    if !same_file(primary, spare) {
        return Ok(());
    }
    refused(format!("{}: is the primary itself; name another spare", spare.display()))
}

/// Make the volume: a capacity means a label at the primary's end, none means the primary is adopted.
fn make(
    primary: &Path,
    spare: &Path,
    capacity: Option<u64>,
    shape: &VolumeShape,
    force: bool,
    made: &mut Made,
) -> Result<String, MakeError> {
    let adopting = capacity.is_none();
    let options = OpenOptions { read_only: adopting, ..OpenOptions::default() };
    check_two_devices(primary, spare)?;
    let primary_device = open::open(primary, &options)?;
    let spare_bytes = spare_size(shape.max_remaps);
    match fs::metadata(spare) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => made.file(spare, spare_bytes)?,
        _ => check_old_spare(spare, spare_bytes, force)?,
    }
    let spare_device = open::open(spare, &OpenOptions::default())?;
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
    let devices = DeviceSet::new(vec![Arc::new(primary_device), Arc::new(spare_device)]);
    let mut reactor = Devices::new(devices, IoEngine::Auto, None)?.reactor()?;
    let mut creation = Creation::new(params);
    let mut result = None;
    drive(&mut *reactor, &Clock::start(), |now, completions, ops| {
        creation.step(now, completions, ops);
        result = result.take().or_else(|| creation.result());
        result.is_some()
    });
    let volume_error = |error| MakeError::Volume { primary: primary.to_owned(), spare: Some(spare.to_owned()), error };
    result.expect("driven to its end").map_err(volume_error)?;
    Ok(format!(
        "{}: volume {set}: {capacity} sectors ({} MiB), spare {} with {} slots{}",
        primary.display(),
        capacity / 2048,
        spare.display(),
        shape.max_remaps,
        if adopting { ", primary adopted unchanged" } else { "" }
    ))
}

/// A spare that exists must be large enough and must not look like somebody else's.
fn check_old_spare(spare: &Path, needed: u64, force: bool) -> Result<(), MakeError> {
    if !is_block_device(spare) {
        let size = fs::metadata(spare).map_or(0, |meta| meta.len());
        if size == 0 {
            return refused(format!(
                "{}: has 0 bytes; remove it so that it is made, or extend it to {needed}",
                spare.display()
            ));
        }
    }
    match content_of(spare)? {
        Some(what) if !force => {
            refused(format!("{}: is not empty ({what}); remove it, or --force to lose what it holds", spare.display()))
        }
        _ => Ok(()),
    }
}

/// What a device's ends hold, if anything.
fn content_of(path: &Path) -> Result<Option<String>, MakeError> {
    let fail = |error: io::Error| MakeError::Refused(format!("{}: cannot be looked at: {error}", path.display()));
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        // Opening it will say what is wrong with it.
        Err(_) => return Ok(None),
    };
    if meta.is_dir() {
        return Ok(None);
    }
    let Ok(mut file) = File::open(path) else { return Ok(None) };
    let size = file.seek(SeekFrom::End(0)).map_err(fail)?;
    let mut bytes = Vec::new();
    for start in [0, size.saturating_sub(LOOK_BYTES)] {
        file.seek(SeekFrom::Start(start)).map_err(fail)?;
        let mut end = Vec::new();
        Read::by_ref(&mut file).take(LOOK_BYTES).read_to_end(&mut end).map_err(fail)?;
        if let Some(name) = (start == 0).then(|| signature(&end)).flatten() {
            return Ok(Some(name.to_owned()));
        }
        bytes.extend(end);
    }
    Ok(bytes.iter().any(|byte| *byte != 0).then(|| "some data".to_owned()))
}

/// The name of what begins with these bytes.
fn signature(head: &[u8]) -> Option<&'static str> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    let known: [(bool, &str); 14] = [
        (at(0, b"VHREMAP1"), "a vhost-remap spare"),
        (at(0, b"QFI\xfb"), "a qcow2 image"),
        (at(0, b"KDMV") || at(0, b"# Disk DescriptorFile"), "a VMDK image"),
        (at(0, b"vhdxfile"), "a VHDX image"),
        (at(0, b"conectix"), "a VHD image"),
        (at(0, b"QED\0"), "a QED image"),
        (at(1080, b"\x53\xef"), "an ext2/3/4 file system"),
        (at(0, b"XFSB"), "an xfs file system"),
        (at(65_600, b"_BHRfS_M"), "a btrfs file system"),
        (at(0, b"LUKS\xba\xbe"), "a LUKS volume"),
        (at(512, b"LABELONE"), "an LVM physical volume"),
        (at(4096, b"\xfc\x4e\x2b\xa9") || at(0, b"\xfc\x4e\x2b\xa9"), "an md array member"),
        (at(512, b"EFI PART"), "a GPT partition table"),
        (at(510, b"\x55\xaa"), "a partition table or boot sector"),
    ];
    known.into_iter().find(|(found, _)| *found).map(|(_, name)| name)
}

/// Image formats are not disks: what the guest would see is their headers.
fn refuse_image_formats(primary: &Path) -> Result<(), MakeError> {
    let mut head = Vec::new();
    if let Ok(file) = File::open(primary) {
        let _ = file.take(4096).read_to_end(&mut head);
    }
    let format = match signature(&head) {
        Some("a qcow2 image") => "qcow2",
        Some("a VMDK image") => "vmdk",
        Some("a VHDX image") => "vhdx",
        Some("a VHD image") => "vpc",
        Some("a QED image") => "qed",
        _ => return Ok(()),
    };
    let path = primary.display();
    refused(format!(
        "{path}: is a {format} image, not a raw disk; convert it: qemu-img convert -f {format} -O raw {path} {path}.raw"
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

/// A volume that is open, with its healer at work.
pub struct ServedVolume {
    healer: HealerThread,
    handle: VolumeHandle,
    ports: Vec<WorkerPort>,
    disk: Arc<DiskInfo>,
    passthrough: bool,
}

/// Open the volume that `options` name, making it first where they say so.
///
/// # Errors
/// When it cannot be opened: one line that says why.
pub fn open_volume(options: &ServeOptions, workers: u32) -> Result<ServedVolume, MakeError> {
    if let (Some(make), Some(spare)) = (&options.create, &options.spare) {
        create_if_absent(options, spare, make.size, &make.shape)?;
    }
    let open_options = OpenOptions {
        read_only: options.read_only || options.degraded,
        direct: options.cache == Cache::None,
        lock_wait: options.lock_wait,
    };
    let spare = options.spare.as_ref().filter(|_| !options.passthrough);
    if let Some(spare) = spare {
        check_two_devices(&options.primary, spare)?;
    }
    let primary = Arc::new(open::open(&options.primary, &open_options)?);
    let mut devices = vec![primary.clone()];
    if let Some(spare) = spare {
        if matches!(fs::metadata(spare), Err(error) if error.kind() == io::ErrorKind::NotFound) {
            return refused(format!(
                "{}: no such file or device; name the spare with --spare, or read what {} still holds with --degraded",
                spare.display(),
                options.primary.display()
            ));
        }
        // Metadata is always written with O_DIRECT, whatever the guest's data is.
        let device = Arc::new(open::open(spare, &OpenOptions { direct: true, ..open_options.clone() })?);
        devices.push(device);
    }
    let faults = options.fault_injection.then(|| Arc::new(FaultTable::new()));
    let devices = Devices::new(DeviceSet::new(devices), options.io_engine, faults)?;
    let opening = opening(options, &devices);
    let epoch = seconds_since_epoch();
    let clock = Clock::start();
    let log = Arc::new(EventLog::new(options.primary.display().to_string(), epoch as f64));
    let (mut to_shards, mut inboxes) = (Vec::new(), Vec::new());
    for _ in 0..workers {
        let (to_shard, inbox) = mailbox()?;
        to_shards.push(to_shard);
        inboxes.push(inbox);
    }
    let params = HealerParams { shards: inboxes.len(), policy: policy(options), epoch };
    let setup = HealerSetup { devices: devices.clone(), opening, params, clock, log: log.clone(), shards: to_shards };
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
        capacity: opened.geometry.capacity,
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
                shard: Shard::new(index, opened.geometry, opened.view.clone(), opened.progress.clone()),
                inbox,
                healer: healer.shards.clone(),
                clock,
                disk: disk.clone(),
                log: log.clone(),
            }
        })
        .collect();
    let handle = VolumeHandle(Arc::new(Served {
        orders: healer.orders.clone(),
        devices,
        opened,
        log,
        clock,
        epoch,
        cache: if options.cache == Cache::None { "none" } else { "writeback" },
        workers,
        transport: options.transport.name(),
        front_end: OnceLock::new(),
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
            let mut serial = [0; 20];
            let name = format!("passthrough-{:x}", primary.inode);
            let len = name.len().min(20);
            serial[..len].copy_from_slice(&name.as_bytes()[..len]);
            Box::new(move || Opening::passthrough(&primary, serial, read_only))
        }
    }
}

/// Served without its spare since the label's list of remapped blocks was written at `stamped`.
fn degraded_event(stamped: u64, now: u64) -> Event {
    Event {
        time: Time(0),
        severity: Severity::Error,
        kind: "degraded",
        device: Some(DeviceIndex::SPARE),
        range: SectorRange::default(),
        cause: "served without it".into(),
        action: format!("read-only; {}", degraded_list(stamped, now)),
    }
}

/// How far a label's list can be trusted that was written at `stamped`.
pub(super) fn degraded_list(stamped: u64, now: u64) -> String {
    let date = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(stamped));
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

/// `serve --create`: only where neither primary nor spare exists is a volume made.
fn create_if_absent(options: &ServeOptions, spare: &Path, size: u64, shape: &VolumeShape) -> Result<(), MakeError> {
    match (options.primary.exists(), spare.exists()) {
        (true, true) => Ok(()),
        (false, false) => {
            let (primary, spare) = (options.primary.clone(), spare.to_owned());
            let line = create(&CreateOptions { primary, spare, size, shape: shape.clone(), force: false })?;
            log::info!("{line}");
            Ok(())
        }
        (true, false) => refused(format!(
            "{}: missing, and {} exists: bring the spare back, or `adopt` the primary with a new one",
            spare.display(),
            options.primary.display()
        )),
        (false, true) => refused(format!(
            "{}: missing, and its spare {} exists: bring the primary back, or remove the spare too",
            options.primary.display(),
            spare.display()
        )),
    }
}

impl ServedVolume {
    /// For operators.
    pub fn handle(&self) -> VolumeHandle {
        self.handle.clone()
    }

    /// What the guest is told of the disk.
    pub fn disk(&self) -> Arc<DiskInfo> {
        self.disk.clone()
    }

    /// The workers' places, one for each. Once.
    pub fn take_ports(&mut self) -> Vec<WorkerPort> {
        std::mem::take(&mut self.ports)
    }

    /// Close cleanly: everything durable, then the stamp that says so. To be called when no worker runs
    /// any more.
    ///
    /// # Errors
    /// When a device does not take it; the volume is then as after a crash, which loses nothing.
    pub fn close(self) -> Result<(), MakeError> {
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
        let stamp = CloseStamp { size: primary.size(), mtime_ns, sample_crc };
        match self.handle.ask(Order::Seal(stamp), CLOSE_TIMEOUT) {
            Some(Reply::Done(result)) => result.map(drop).map_err(left)?,
            _ => return Err(left(format!("no answer for {} s", CLOSE_TIMEOUT.as_secs()))),
        }
        drop(self.healer);
        Ok(())
    }
}
