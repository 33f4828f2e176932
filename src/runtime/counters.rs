//! What the threads of a volume count, each in a place of its own, so that counting costs a guest next to nothing: no
//! lock, no bus-locked instruction, no cache line that two threads write. Whoever reports adds up.

use std::sync::Arc;
// Not `sync`'s: these say nothing about anything else, so there is no order of threads that a model checker should try.
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::latency::{BUCKETS, Histogram, bucket};
use crate::device::{DeviceIndex, Op, OpKind};
use crate::engine::request::Operation;
use crate::units::Time;

/// No request is under way.
const NEVER: u64 = u64::MAX;
/// Devices of a volume: primary and spare.
const DEVICES: usize = 2;

/// Kinds of device operations that are counted, by their place.
pub const DEVICE_OPERATIONS: [&str; 5] = ["read", "write", "flush", "discard", "write_zeroes"];

/// A number that one thread writes and all may read.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    /// To be called by one thread only: the addition is no single step.
    #[inline]
    fn add(&self, more: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(more), Relaxed);
    }

    #[inline]
    fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    #[inline]
    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Requests of one kind. What each answer touches comes first.
#[derive(Debug)]
struct OperationCounters {
    bytes: Counter,
    took_ns: Counter,
    took_ns_max: Counter,
    failed: Counter,
    under_way: Counter,
    oldest_start_ns: Counter,
    buckets: [Counter; BUCKETS],
}

impl OperationCounters {
    fn new() -> OperationCounters {
        OperationCounters {
            bytes: Counter::default(),
            took_ns: Counter::default(),
            took_ns_max: Counter::default(),
            failed: Counter::default(),
            under_way: Counter::default(),
            oldest_start_ns: Counter(AtomicU64::new(NEVER)),
            buckets: std::array::from_fn(|_| Counter::default()),
        }
    }

    #[cold]
    fn fail(&self) {
        self.failed.add(1);
    }

    /// Add how long the answers took.
    fn add_to(&self, latency: &mut Histogram) {
        latency.sum_ns = latency.sum_ns.wrapping_add(self.took_ns.get());
        latency.max_ns = latency.max_ns.max(self.took_ns_max.get());
        for (sum, count) in latency.counts.iter_mut().zip(&self.buckets) {
            *sum += count.get();
        }
    }
}

/// What one worker counts. Aligned, so that no line of it (nor the one that a processor fetches along) is another's.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerCounters {
    operations: [OperationCounters; Operation::COUNT],
    /// Operations on devices.
    pub devices: DeviceCounters,
}

impl WorkerCounters {
    /// A request was answered, so long after it was taken from its queue; `bytes` is what it was about, and `None` if
    /// it failed.
    #[inline]
    pub fn answered(&self, operation: Operation, took_ns: u64, bytes: Option<u64>) {
        let counters = &self.operations[operation.index()];
        match bytes {
            Some(bytes) => counters.bytes.add(bytes),
            None => counters.fail(),
        }
        counters.took_ns.add(took_ns);
        if took_ns > counters.took_ns_max.get() {
            counters.took_ns_max.set(took_ns);
        }
        counters.buckets[bucket(took_ns)].add(1);
    }

    /// How many requests of each kind are under way, and when the oldest was taken.
    #[inline]
    pub fn set_under_way(&self, under_way: &[(u32, Option<Time>); Operation::COUNT]) {
        for (counters, (len, oldest)) in self.operations.iter().zip(under_way) {
            counters.under_way.set(u64::from(*len));
            counters.oldest_start_ns.set(oldest.map_or(NEVER, |time| time.0));
        }
    }
}

impl Default for WorkerCounters {
    fn default() -> Self {
        WorkerCounters {
            operations: std::array::from_fn(|_| OperationCounters::new()),
            devices: DeviceCounters::default(),
        }
    }
}

/// What one thread sends to devices: counts and bytes by device and kind.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct DeviceCounters([[[Counter; 2]; DEVICE_OPERATIONS.len()]; DEVICES]);

impl DeviceCounters {
    /// An operation is submitted.
    #[inline]
    pub fn submitted(&self, op: &Op) {
        // The two that matter first.
        if op.kind == OpKind::Read {
            self.count(op, 0);
        } else if op.kind == OpKind::Write {
            self.count(op, 1);
        } else {
            self.rarely(op);
        }
    }

    #[inline]
    fn count(&self, op: &Op, kind: usize) {
        if let Some(device) = self.0.get(usize::from(op.device.0)) {
            let [count, bytes] = &device[kind];
            count.add(1);
            bytes.add(op.len);
        }
    }

    #[cold]
    fn rarely(&self, op: &Op) {
        match op.kind {
            OpKind::Flush => self.count(op, 2),
            OpKind::Discard => self.count(op, 3),
            OpKind::WriteZeroes { .. } => self.count(op, 4),
            OpKind::Read | OpKind::Write | OpKind::Identify => {}
        }
    }

    fn get(&self, device: DeviceIndex, kind: usize) -> [u64; 2] {
        self.0[usize::from(device.0)][kind].each_ref().map(Counter::get)
    }
}

/// Requests of one kind, of all workers together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OperationNumbers {
    /// Answered with an error.
    pub failed: u64,
    /// Bytes of those answered well.
    pub bytes: u64,
    /// Taken and not yet answered.
    pub under_way: u64,
    /// When the oldest of those was taken.
    pub oldest_start: Option<Time>,
    /// Time from the taking to the answer, of all answered requests.
    pub latency: Histogram,
}

/// What all threads of a volume count. A clone is of the same counters.
#[derive(Clone, Debug)]
pub struct Counters {
    /// By worker.
    pub workers: Vec<Arc<WorkerCounters>>,
    /// What the healer sends to devices.
    pub healer: Arc<DeviceCounters>,
}

impl Counters {
    /// Nothing counted, by so many workers.
    pub fn new(workers: u32) -> Counters {
        Counters { workers: (0..workers).map(|_| Arc::default()).collect(), healer: Arc::default() }
    }

    /// The requests of one kind.
    pub fn operation(&self, operation: Operation) -> OperationNumbers {
        let mut numbers = OperationNumbers::default();
        for worker in &self.workers {
            let counters = &worker.operations[operation.index()];
            numbers.failed += counters.failed.get();
            numbers.bytes += counters.bytes.get();
            numbers.under_way += counters.under_way.get();
            let start = Some(Time(counters.oldest_start_ns.get())).filter(|start| start.0 != NEVER);
            numbers.oldest_start = numbers.oldest_start.into_iter().chain(start).min();
            counters.add_to(&mut numbers.latency);
        }
        numbers
    }

    /// Requests of all kinds that were taken and not yet answered.
    pub fn under_way(&self) -> u64 {
        let operations = self.workers.iter().flat_map(|worker| &worker.operations);
        operations.map(|counters| counters.under_way.get()).sum()
    }

    /// Time from the taking to the answer, of all answered requests of all kinds.
    pub fn latency(&self) -> Histogram {
        let mut latency = Histogram::new();
        self.workers.iter().flat_map(|worker| &worker.operations).for_each(|counters| counters.add_to(&mut latency));
        latency
    }

    /// Operations of one of [`DEVICE_OPERATIONS`] sent to a device, and their bytes.
    pub fn device(&self, device: DeviceIndex, kind: usize) -> [u64; 2] {
        let workers = self.workers.iter().map(|worker| &worker.devices);
        let all = workers.chain([&*self.healer]).map(|counters| counters.get(device, kind));
        all.fold([0, 0], |sum, more| [sum[0] + more[0], sum[1] + more[1]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Tag;
    use crate::device::buffer::IoSlice;

    #[test]
    fn what_workers_count_adds_up() {
        let counters = Counters::new(2);
        counters.workers[0].answered(Operation::Read, 1000, Some(4096));
        counters.workers[1].answered(Operation::Read, 3000, None);
        counters.workers[1].answered(Operation::Flush, 7, Some(0));
        let idle = (0, None);
        counters.workers[0].set_under_way(&[(2, Some(Time(50))), idle, idle, idle, idle]);
        counters.workers[1].set_under_way(&[(1, Some(Time(40))), idle, idle, idle, idle]);
        let reads = counters.operation(Operation::Read);
        assert_eq!((reads.failed, reads.bytes, reads.latency.count()), (1, 4096, 2));
        assert_eq!((reads.under_way, reads.oldest_start), (3, Some(Time(40))));
        assert_eq!((reads.latency.sum_ns, reads.latency.max_ns), (4000, 3000));
        assert_eq!(counters.latency().sum_ns, 4007);
        assert_eq!(counters.operation(Operation::Flush).latency.quantile_ns(990_000), Some(7));
        assert_eq!(counters.operation(Operation::Discard), OperationNumbers::default());
        counters.workers[0].set_under_way(&[idle; 5]);
        assert_eq!(counters.operation(Operation::Read).under_way, 1);
    }

    #[test]
    fn operations_of_workers_and_healer_on_a_device_add_up() {
        let counters = Counters::new(1);
        let op = |device, kind, len| Op { tag: Tag(0), device, kind, offset: 0, len, data: IoSlice::EMPTY };
        counters.workers[0].devices.submitted(&op(DeviceIndex::PRIMARY, OpKind::Read, 512));
        counters.healer.submitted(&op(DeviceIndex::PRIMARY, OpKind::Read, 4096));
        counters.healer.submitted(&op(DeviceIndex::PRIMARY, OpKind::Identify, 0));
        counters.healer.submitted(&op(DeviceIndex::SPARE, OpKind::Flush, 0));
        assert_eq!(counters.device(DeviceIndex::PRIMARY, 0), [2, 4608]);
        assert_eq!(counters.device(DeviceIndex::SPARE, 2), [1, 0]);
        assert_eq!(counters.device(DeviceIndex::SPARE, 0), [0, 0]);
    }
}
