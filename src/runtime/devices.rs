//! The devices of a volume: opened once, reached by each thread through a queue of its own.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::options::IoEngine;
use crate::device::fault::{FaultDevice, FaultTable};
use crate::device::open::{DeviceSet, Kind, OpenDevice};
use crate::device::threads::ThreadReactor;
use crate::device::uring::UringReactor;
use crate::device::{DeviceIndex, Reactor};
use crate::engine::open::DeviceFacts;

/// Entries of a thread's submission ring; more operations wait inside the device layer.
const RING_DEPTH: u32 = 256;
/// Threads of a pool where io_uring cannot be used.
const POOL_THREADS: usize = 8;

/// Open devices and the way to reach them.
#[derive(Clone)]
pub struct Devices {
    set: DeviceSet,
    uring: bool,
    /// For `status`: the engine, and why it is not the first choice.
    pub engine: String,
    /// The rules of fault injection, where that is on.
    pub faults: Option<Arc<FaultTable>>,
}

impl Devices {
    /// Whether this way of I/O can be had here.
    ///
    /// # Errors
    /// When io_uring was asked for and the host does not allow it.
    pub fn check_engine(engine: IoEngine) -> io::Result<()> {
        Devices::new(DeviceSet::new(Vec::new()), engine, None).map(drop)
    }

    /// Choose the way of I/O for devices that are open.
    ///
    /// # Errors
    /// When io_uring was asked for and the host does not allow it.
    pub fn new(set: DeviceSet, engine: IoEngine, faults: Option<Arc<FaultTable>>) -> io::Result<Devices> {
        let tried = match engine {
            IoEngine::Threads => Err("as asked for".to_owned()),
            IoEngine::Auto | IoEngine::IoUring => UringReactor::new(&set, 8)
                .map(drop)
                .map_err(|error| format!("io_uring cannot be used on this host: {error}")),
        };
        let (uring, engine) = match (tried, engine) {
            (Ok(()), _) => (true, "io_uring".to_owned()),
            (Err(why), IoEngine::IoUring) => {
                let hint = "allow it (kernel.io_uring_disabled, seccomp) or use --io-engine threads";
                return Err(io::Error::other(format!("{why}; {hint}")));
            }
            (Err(why), _) => (false, format!("threads ({why})")),
        };
        Ok(Devices { set, uring, engine, faults })
    }

    /// A queue for this thread.
    ///
    /// # Errors
    /// When the host has no memory or descriptors left for it.
    pub fn reactor(&self) -> io::Result<Box<dyn Reactor>> {
        let inner: Box<dyn Reactor> = if self.uring {
            Box::new(UringReactor::new(&self.set, RING_DEPTH)?)
        } else {
            Box::new(ThreadReactor::new(&self.set, POOL_THREADS)?)
        };
        Ok(match &self.faults {
            Some(table) => Box::new(FaultDevice::new(inner, table.clone())),
            None => inner,
        })
    }

    /// A device, if there is one of that number.
    pub fn get(&self, device: DeviceIndex) -> Option<&Arc<OpenDevice>> {
        self.set.get(device)
    }
}

/// What the engine wants to know of a device.
pub fn facts(device: &OpenDevice) -> DeviceFacts {
    DeviceFacts {
        size: device.size(),
        logical_block: device.geometry.logical_block,
        inode: device.identity.inode,
        wwn: device.identity.serial.clone().unwrap_or_default(),
        mtime_ns: u64::try_from(device.identity.mtime_ns).unwrap_or(0),
    }
}

/// Whether a path is (or will be) a regular file.
pub fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

/// Whether the device is a file.
pub fn is_file(device: &OpenDevice) -> bool {
    device.geometry.kind == Kind::File
}
