//! A volume that changes hands in a live migration: the server that the guest leaves closes it, the one it comes to
//! opens it, and at no time have both.
//!
//! A server lets go of its volume when its last queue stops while the front-end logs writes to guest memory, which
//! is what a front-end does at the end of a migration, or when the front-end asks for the device's state. It takes
//! the volume again when a queue starts. One that was started for an incoming guest has looked at the superblocks
//! so far, so that it can show the disk.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::devices::{Devices, facts};
use super::handle::{FrontEndState, Refused, VolumeHandle};
use super::health::HealthReport;
use super::options::ServeOptions;
use super::report::{
    BlockReport, Counters, DeviceReport, EventPage, ListEntry, ListFilter, SCHEMA_VERSION, StatusReport,
};
use super::scan_report::ScanReport;
use super::stats::{self, StatsReport};
use super::volume::{MakeError, ServedVolume, Standing, open_volume, passthrough_serial, run_script};
use super::worker::{Clock, DiskInfo, WorkerPort};
use crate::device::DeviceIndex;
use crate::device::fault::FaultTable;
use crate::device::open::{self, DeviceSet};
use crate::engine::event::{Event, EventKind, Severity};
use crate::engine::open::Look;
use crate::engine::scan::Scanned;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::units::{Block, SECTOR_SIZE, SectorRange};
use crate::volume::superblock::RO_COMPAT_KNOWN;

/// Version of [`State`]; another one is refused.
const STATE_VERSION: u32 = 1;

/// What goes with a guest to its next server (vhost-user "Back-end state"), as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    version: u32,
    /// Set UUID; nil for a primary without metadata.
    volume: Uuid,
    /// Of the superblock, after the volume was closed.
    generation: u64,
}

/// Why a volume does not change hands: one line.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// It does not open or close.
    #[error(transparent)]
    Volume(#[from] MakeError),
    /// The front-end was told of another disk.
    #[error(
        "{disk}: is not the disk that the front-end was shown (volume {shown}, and now volume {found}); start the \
         server again"
    )]
    Changed {
        /// The primary's path.
        disk: String,
        /// The volume at the start.
        shown: Uuid,
        /// The volume now.
        found: Uuid,
    },
    /// What came with the guest is no state of ours.
    #[error("{disk}: the state that came with the guest cannot be read ({reason}); migrate it from a vhost-remap")]
    NoState {
        /// The primary's path.
        disk: String,
        /// The reason.
        reason: String,
    },
    /// The guest has used another disk than this one.
    #[error(
        "{disk}: the guest comes with volume {came} of generation {came_generation}, and this is volume {is} of generation \
         {is_generation}: another volume, or a copy of it that is older or newer; name the one it used"
    )]
    Other {
        /// The primary's path.
        disk: String,
        /// The guest's volume.
        came: Uuid,
        /// Its generation.
        came_generation: u64,
        /// The volume here.
        is: Uuid,
        /// Its generation.
        is_generation: u64,
    },
    /// The volume here has been written to.
    #[error("{0}: has been written to since it was opened here; restart the server before a guest comes to it")]
    Written(String),
}

/// What a volume that is away is known by.
struct Seen {
    set: Uuid,
    generation: u64,
    disk: DiskInfo,
    remaps_max: u32,
}

/// The volume of a server, whether it is open here or away.
pub struct HeldVolume {
    options: ServeOptions,
    workers: u32,
    standing: Arc<Standing>,
    disk: Arc<DiskInfo>,
    set: Uuid,
    remaps_max: u32,
    volume: Mutex<Option<ServedVolume>>,
    /// Of the open volume, for those who only ask.
    handle: Mutex<Option<VolumeHandle>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HeldVolume {
    /// Open the volume that `options` name; its ports are there to be taken.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(options: &ServeOptions, workers: u32) -> Result<HeldVolume, MakeError> {
        let standing = Arc::new(Standing::new(options, workers));
        let volume = open_volume(options, workers, &standing)?;
        let handle = volume.handle();
        Ok(HeldVolume {
            options: ServeOptions { create: None, ..options.clone() },
            workers,
            standing,
            disk: volume.disk(),
            set: handle.set(),
            remaps_max: handle.remaps_max(),
            handle: Mutex::new(Some(handle)),
            volume: Mutex::new(Some(volume)),
        })
    }

    /// Only look at the volume, which another server may have: it is opened when a guest comes.
    ///
    /// # Errors
    /// When there is none.
    pub fn incoming(options: &ServeOptions, workers: u32) -> Result<HeldVolume, MakeError> {
        let Seen { set, disk, remaps_max, .. } = look(options)?;
        Ok(HeldVolume {
            options: options.clone(),
            workers,
            standing: Arc::new(Standing::new(options, workers)),
            disk: Arc::new(disk),
            set,
            remaps_max,
            handle: Mutex::new(None),
            volume: Mutex::new(None),
        })
    }

    /// What the guest is told of the disk.
    pub fn disk(&self) -> Arc<DiskInfo> {
        self.disk.clone()
    }

    /// The volume's UUID.
    pub fn set(&self) -> Uuid {
        self.set
    }

    /// Say whom to ask about the front-end. Once.
    pub fn set_front_end(&self, ask: impl Fn() -> FrontEndState + Send + Sync + 'static) {
        let _ = self.standing.front_end.set(Box::new(ask));
    }

    /// Say whom to tell that the disk has another size than was shown. Once.
    pub fn set_announce(&self, announce: impl Fn() + Send + Sync + 'static) {
        let shown = self.disk.capacity.clone();
        let _ = self.standing.announce.set(Box::new(move |capacity| {
            shown.store(capacity, Ordering::SeqCst);
            announce();
        }));
    }

    /// The clock of its events.
    pub fn clock(&self) -> Clock {
        self.standing.clock
    }

    /// The workers' places, if the volume is open: one for each, once after it was opened.
    pub fn ports(&self) -> Vec<WorkerPort> {
        lock(&self.volume).as_mut().map(ServedVolume::take_ports).unwrap_or_default()
    }

    /// Open a volume that is away, once the other server has let go of it; it must be of the generation that
    /// [`HeldVolume::check`] gave, if it was asked. The answer is whether its guest's cache was switched to
    /// write-through; taken to be so where nobody knows.
    ///
    /// # Errors
    /// When it does not open, or is no longer the disk that the front-end was shown.
    pub fn take(&self, expected: Option<u64>) -> Result<bool, HandoverError> {
        let mut place = lock(&self.volume);
        assert!(place.is_none(), "a volume is taken by one that does not have it");
        let volume = open_volume(&self.options, self.workers, &self.standing)?;
        let write_through = volume.closed_write_through().unwrap_or(true);
        if let Err(error) = self.is_as_shown(&volume, expected) {
            volume.close(write_through)?;
            return Err(error);
        }
        // It may have grown where it was. A front-end is told to look when its queues are started.
        self.disk.capacity.store(volume.disk().capacity.load(Ordering::SeqCst), Ordering::SeqCst);
        self.note(EventKind::TakenOver, "the guest is served here", "opened");
        *lock(&self.handle) = Some(volume.handle());
        *place = Some(volume);
        Ok(write_through)
    }

    fn is_as_shown(&self, volume: &ServedVolume, expected: Option<u64>) -> Result<(), HandoverError> {
        let (found, shown) = (volume.disk(), &self.disk);
        let sectors = |disk: &DiskInfo| disk.capacity.load(Ordering::SeqCst);
        let kind = |disk: &DiskInfo| (disk.logical_block_size, disk.read_only, disk.serial);
        if volume.handle().set() != self.set || kind(&found) != kind(shown) || sectors(&found) < sectors(shown) {
            return Err(HandoverError::Changed { disk: self.name(), shown: self.set, found: volume.handle().set() });
        }
        let is = (self.set, volume.found_generation());
        expected.map_or(Ok(()), |generation| self.check_same((self.set, generation), is))
    }

    /// Refuse a guest that has used another volume, or another generation of it, than there is.
    fn check_same(&self, came: (Uuid, u64), is: (Uuid, u64)) -> Result<(), HandoverError> {
        if came == is {
            return Ok(());
        }
        let (disk, (came, came_generation), (is, is_generation)) = (self.name(), came, is);
        Err(HandoverError::Other { disk, came, came_generation, is, is_generation })
    }

    /// Close the volume, if it is open: another server may open it then. No worker may run any more.
    ///
    /// # Errors
    /// When it was not closed cleanly; it is away nevertheless, and the next opening repairs it.
    pub fn give(&self, write_through: bool) -> Result<(), MakeError> {
        let mut place = lock(&self.volume);
        let Some(volume) = place.take() else { return Ok(()) };
        *lock(&self.handle) = None;
        volume.close(write_through)
    }

    /// As [`HeldVolume::give`], for a guest that leaves.
    ///
    /// # Errors
    /// As there.
    pub fn hand_over(&self, write_through: bool) -> Result<(), MakeError> {
        self.give(write_through)?;
        self.note(EventKind::HandedOver, "the guest has stopped to leave", "closed, for another server to open");
        Ok(())
    }

    /// What goes with the guest that has left. The volume must be away.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn state(&self) -> Result<Vec<u8>, HandoverError> {
        let Seen { set, generation, .. } = look(&self.options)?;
        let state = State { version: STATE_VERSION, volume: set, generation };
        Ok(serde_json::to_vec(&state).expect("plain data with string keys"))
    }

    /// See whether a guest that comes with this state has used the volume as it is here, to the last close; its
    /// generation.
    ///
    /// # Errors
    /// When it has not.
    pub fn check(&self, state: &[u8]) -> Result<u64, HandoverError> {
        let no_state = |reason: String| HandoverError::NoState { disk: self.name(), reason };
        let came: State = serde_json::from_slice(state).map_err(|error| no_state(error.to_string()))?;
        if came.version != STATE_VERSION {
            return Err(no_state(format!("it has version {}, and this program knows {STATE_VERSION}", came.version)));
        }
        let (set, generation) = match &*lock(&self.volume) {
            Some(volume) if volume.handle().is_written() => return Err(HandoverError::Written(self.name())),
            Some(volume) => (self.set, volume.found_generation()),
            None => {
                let seen = look(&self.options)?;
                (seen.set, seen.generation)
            }
        };
        self.check_same((came.volume, came.generation), (set, generation))?;
        Ok(generation)
    }

    /// Whether it is being opened or closed at the moment.
    pub fn is_changing_hands(&self) -> bool {
        self.volume.try_lock().is_err()
    }

    /// Whether the healer and every worker answer now, if the volume is open here.
    pub fn has_pulse(&self) -> bool {
        self.handle().is_none_or(|handle| handle.has_pulse())
    }

    fn name(&self) -> String {
        self.options.primary.display().to_string()
    }

    fn note(&self, kind: EventKind, cause: &str, action: &str) {
        self.standing.log.push(Event {
            time: self.standing.clock.now(),
            severity: Severity::Info,
            kind,
            device: None,
            range: SectorRange::default(),
            cause: cause.to_owned(),
            action: action.to_owned(),
        });
    }

    fn handle(&self) -> Option<VolumeHandle> {
        lock(&self.handle).clone()
    }

    /// Why nothing can be asked of a volume that is away.
    fn away(&self) -> String {
        format!("{}: is not open here: it is opened when a guest starts to use it", self.name())
    }

    /// The state now.
    pub fn status(&self) -> StatusReport {
        self.handle().and_then(|handle| handle.status()).unwrap_or_else(|| self.away_report())
    }

    /// Requests and device operations in numbers.
    pub fn stats(&self) -> StatsReport {
        let standing = &*self.standing;
        let healer = self.handle().and_then(|handle| handle.healer_status());
        let spare = self.options.spare.as_ref().filter(|_| !self.options.passthrough).map(|_| DeviceIndex::SPARE);
        let devices: Vec<DeviceIndex> = [DeviceIndex::PRIMARY].into_iter().chain(spare).collect();
        let front_end = standing.front_end.get().map(|ask| ask()).unwrap_or_default();
        let source = stats::Source {
            volume: self.set.to_string(),
            started: standing.epoch,
            now: standing.clock.now(),
            malformed_requests: front_end.malformed_requests,
            last_remap: standing.log.last_remap(),
            devices: &devices,
            healer: healer.as_deref(),
        };
        stats::report(&standing.counters, &source)
    }

    fn away_report(&self) -> StatusReport {
        let standing = &*self.standing;
        let front_end = standing.front_end.get().map(|ask| ask()).unwrap_or_default();
        let paths = [("primary", Some(&self.options.primary)), ("spare", self.options.spare.as_ref())];
        let devices = paths.into_iter().filter_map(|(role, path)| {
            Some(DeviceReport {
                role: role.into(),
                path: path?.display().to_string(),
                state: "away".into(),
                ..DeviceReport::default()
            })
        });
        StatusReport {
            schema: SCHEMA_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            volume: self.set.to_string(),
            state: vec!["away".into()],
            messages: vec![self.away()],
            devices: devices.collect(),
            capacity_sectors: self.disk.capacity.load(Ordering::SeqCst),
            blocks: BlockReport { remaps_max: u64::from(self.remaps_max), ..BlockReport::default() },
            counters: Counters::default(),
            lifetime: Counters::default(),
            uptime_seconds: standing.clock.now().0 / 1_000_000_000,
            started: standing.epoch,
            io_engine: "none".into(),
            cache: self.options.cache.name().into(),
            workers: self.workers,
            polling_us: self.options.polling_us(self.workers),
            transport: self.options.transport.name().into(),
            connected: front_end.connected,
            oldest_in_flight_ms: front_end.oldest_in_flight_ms,
            malformed_requests: front_end.malformed_requests,
            events_dropped: standing.log.dropped(),
            health: String::new(),
            health_score: 0,
            counters_since: standing.epoch,
            scan: ScanReport::default(),
            request_ns: 0,
            failed_writes_in_a_row: 0,
        }
    }

    /// See [`VolumeHandle::list`].
    ///
    /// # Errors
    /// While the volume is away.
    pub fn list(&self, filter: ListFilter, from: u64, limit: usize) -> Result<Vec<ListEntry>, Refused> {
        self.handle().and_then(|handle| handle.list(filter, from, limit)).ok_or_else(|| Refused(self.away()))
    }

    /// See [`VolumeHandle::health`].
    ///
    /// # Errors
    /// While the volume is away.
    pub fn health(&self) -> Result<HealthReport, Refused> {
        self.handle().and_then(|handle| handle.health()).ok_or_else(|| Refused(self.away()))
    }

    /// Slow blocks, and what the scanner has read; nothing while the volume is away.
    pub fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)> {
        self.handle()?.scanned()
    }

    /// Events after number `after`, at most `limit`.
    pub fn events(&self, after: u64, limit: usize) -> EventPage {
        self.standing.log.page(after, limit)
    }

    /// The fault rules, where the server was started with fault injection.
    pub fn faults(&self) -> Option<&Arc<FaultTable>> {
        self.standing.faults.as_ref()
    }

    /// Whom to give orders to.
    ///
    /// # Errors
    /// While the volume is away.
    pub fn open_volume(&self) -> Result<VolumeHandle, Refused> {
        self.handle().ok_or_else(|| Refused(self.away()))
    }
}

/// Look at the superblocks of a volume that another server may have open.
fn look(options: &ServeOptions) -> Result<Seen, MakeError> {
    let primary = Arc::new(open::look(&options.primary)?);
    let primary_facts = facts(&primary);
    let Some(spare) = options.spare.as_ref().filter(|_| !options.passthrough) else {
        let disk = DiskInfo {
            capacity: Arc::new(AtomicU64::new(primary.size() / SECTOR_SIZE)),
            logical_block_size: primary_facts.logical_block,
            read_only: options.read_only,
            serial: passthrough_serial(&primary_facts),
        };
        return Ok(Seen { set: Uuid::nil(), generation: 0, disk, remaps_max: 0 });
    };
    let spare_device = Arc::new(open::look(spare)?);
    let spare_facts = facts(&spare_device);
    let devices = DeviceSet::new(vec![primary, spare_device]);
    let mut reactor = Devices::new(devices, options.io_engine, None)?.reactor()?;
    let mut look = Look::new(primary_facts, spare_facts);
    let seen = run_script(&mut *reactor, |now, completions, ops| {
        look.step(now, completions, ops);
        look.result()
    });
    let superblock = seen.map_err(|error| MakeError::Volume {
        primary: options.primary.clone(),
        spare: Some(spare.clone()),
        error,
    })?;
    Ok(Seen {
        set: superblock.set,
        generation: superblock.generation,
        disk: DiskInfo {
            capacity: Arc::new(AtomicU64::new(superblock.capacity)),
            logical_block_size: superblock.logical_block,
            read_only: options.read_only || superblock.features[1] & !RO_COMPAT_KNOWN != 0,
            serial: superblock.serial,
        },
        remaps_max: superblock.max_remaps,
    })
}
