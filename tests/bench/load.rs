//! A load on a backend's queues, one thread each, and what it saw.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::content::{BLOCK, Content, SECTORS_PER_BLOCK};
use crate::machine::{Placement, Watch, pin, process_time};
use crate::ring::{FLUSH, IN, OUT, Ring};
use crate::session;

/// No answer takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Before anything is counted: caches, frequencies and whatever a backend learns.
const WARM_UP: Duration = Duration::from_millis(200);
/// One read of so many is compared with what was written, each of its bytes.
const SAMPLE: u64 = 16;
/// A polled client looks at the clock after so many fruitless looks at the ring.
const SPINS: u32 = 1 << 16;

/// What requests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Pattern {
    RandomRead,
    RandomWrite,
    SequentialRead,
    SequentialWrite,
    /// Random, 70 % reads.
    Mixed,
    /// Random writes, and a flush after each eight.
    FlushHeavy,
}

/// A load.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Load {
    pub(crate) pattern: Pattern,
    /// Bytes of a request.
    pub(crate) size: usize,
    /// Requests at a time on each queue.
    pub(crate) depth: usize,
    pub(crate) queues: usize,
    /// The client looks at the used ring all the time, and asks for no notification.
    pub(crate) polled: bool,
    pub(crate) indirect: bool,
}

/// The blocks that a load is about: every `stride`-th of `count` from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Area {
    pub(crate) first: usize,
    pub(crate) count: usize,
    pub(crate) stride: usize,
}

/// What was measured in one run.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) iops: f64,
    pub(crate) megabytes_per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    /// Of all threads of the backend.
    pub(crate) cpu_us_per_io: Option<f64>,
    pub(crate) resident_bytes: Option<u64>,
    /// Percent of one processor that others took.
    pub(crate) disturbance_percent: f64,
    /// All requests of the connection, those before and after the measurement included.
    pub(crate) requests: u64,
    /// Reads whose data was compared.
    pub(crate) checked: u64,
}

/// Where a run is.
const BEFORE: u8 = 0;
const MEASURED: u8 = 1;
const AFTER: u8 = 2;

/// One thread's part of the load.
struct Client<'a> {
    ring: Ring,
    load: Load,
    area: Area,
    versions: &'a mut [u32],
    /// Blocks, counted from the first of `versions`, that a write under way will change.
    changing: Vec<bool>,
    /// Of each slot.
    under_way: Vec<UnderWay>,
    called: Epoll,
    free: Vec<usize>,
    random: u64,
    next: usize,
    counts: Counts,
}

/// A request.
#[derive(Clone, Copy)]
struct UnderWay {
    kind: u32,
    /// Its first block, counted from the first of the client's.
    block: usize,
    start: Instant,
    /// Of a read to be compared: the oldest version of its first block that it may see.
    compare: Option<u32>,
}

/// A sector that no disk here has.
const NOWHERE: u64 = 0xffff_0000;

struct Counts {
    times: Histogram<u64>,
    measured: u64,
    requests: u64,
    checked: u64,
}

/// Run a load on the backend that listens at `socket`, for so long beside a warm-up.
///
/// # Errors
/// When a request fails, or reads what was not written, or takes for ever, or the backend cannot be used.
pub(crate) fn run(
    socket: &Path,
    backend: u32,
    load: Load,
    area: Area,
    content: &mut Content,
    time: Duration,
) -> Result<Figures, String> {
    let placement = Placement::of(load.queues);
    let (session, rings) = session::connect(socket, load.queues, load.depth, load.size, load.indirect)?;
    let phase = AtomicU8::new(BEFORE);
    let share = area.count / load.queues / (load.size / BLOCK) * (load.size / BLOCK);
    let versions = content.versions[area.first..area.first + share * load.queues].chunks_mut(share);
    let (counts, elapsed, cpu, disturbance) = std::thread::scope(|scope| {
        let clients: Vec<_> = rings
            .into_iter()
            .zip(versions)
            .enumerate()
            .map(|(queue, (ring, versions))| {
                let area = Area { first: area.first + queue * share, count: share, stride: area.stride };
                let client = Client::new(ring, load, area, versions, queue);
                let (cpu, phase) = (placement.queues[queue], &phase);
                scope.spawn(move || {
                    pin(&[cpu]);
                    client.run(phase)
                })
            })
            .collect();
        std::thread::sleep(WARM_UP);
        let watch = Watch::start();
        let (start, cpu_before) = (Instant::now(), process_time(backend));
        phase.store(MEASURED, Ordering::Relaxed);
        std::thread::sleep(time);
        phase.store(AFTER, Ordering::Relaxed);
        let (elapsed, cpu_after) = (start.elapsed(), process_time(backend));
        let disturbance = watch.disturbance();
        let counts: Result<Vec<Counts>, String> =
            clients.into_iter().map(|client| client.join().expect("a client says what is wrong")).collect();
        let cpu = cpu_after.zip(cpu_before).map(|(after, before)| after.saturating_sub(before));
        (counts, elapsed, cpu, disturbance)
    });
    drop(session);
    figures(load, counts?, elapsed, cpu, disturbance, backend)
}

fn figures(
    load: Load,
    counts: Vec<Counts>,
    elapsed: Duration,
    cpu: Option<Duration>,
    disturbance_percent: f64,
    backend: u32,
) -> Result<Figures, String> {
    let mut times = new_histogram();
    counts.iter().for_each(|part| times.add(&part.times).expect("the same bounds"));
    let measured: u64 = counts.iter().map(|part| part.measured).sum();
    let checked = counts.iter().map(|part| part.checked).sum();
    if measured == 0 {
        return Err("no request ended while it was measured: it takes more SECONDS".into());
    }
    let reads = !matches!(load.pattern, Pattern::RandomWrite | Pattern::SequentialWrite | Pattern::FlushHeavy);
    if reads && checked == 0 {
        return Err("no read was compared: it takes more SECONDS".into());
    }
    let micros = |quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    let iops = measured as f64 / elapsed.as_secs_f64();
    Ok(Figures {
        iops,
        megabytes_per_second: iops * load.size as f64 / 1e6,
        p50_us: micros(0.5),
        p99_us: micros(0.99),
        p999_us: micros(0.999),
        cpu_us_per_io: cpu.map(|cpu| cpu.as_secs_f64() * 1e6 / measured as f64),
        resident_bytes: crate::machine::resident(backend),
        disturbance_percent,
        requests: counts.iter().map(|part| part.requests).sum(),
        checked,
    })
}

/// From 100 ns to the limit of an answer, to three digits.
fn new_histogram() -> Histogram<u64> {
    let most = u64::try_from(ANSWER_LIMIT.as_nanos()).expect("seconds");
    Histogram::new_with_bounds(100, 2 * most, 3).expect("legal bounds")
}

impl<'a> Client<'a> {
    fn new(ring: Ring, load: Load, area: Area, versions: &'a mut [u32], queue: usize) -> Client<'a> {
        let called = Epoll::new().expect("an epoll instance");
        let readable = EpollEvent::new(EventSet::IN, 0);
        called.ctl(ControlOperation::Add, ring.call.as_raw_fd(), readable).expect("an eventfd can be watched");
        let nothing = UnderWay { kind: FLUSH, block: 0, start: Instant::now(), compare: None };
        Client {
            ring,
            load,
            area,
            changing: vec![false; versions.len()],
            versions,
            under_way: vec![nothing; load.depth],
            called,
            free: (0..load.depth).collect(),
            random: 0x2545_f491_4f6c_dd1d ^ (queue as u64 + 1) << 32,
            next: 0,
            counts: Counts { times: new_histogram(), measured: 0, requests: 0, checked: 0 },
        }
    }

    fn run(mut self, phase: &AtomicU8) -> Result<Counts, String> {
        if self.load.polled {
            self.ring.disarm();
        }
        loop {
            let now = phase.load(Ordering::Relaxed);
            if now == AFTER && self.free.len() == self.load.depth {
                return Ok(self.counts);
            }
            if now != AFTER {
                self.fill();
            }
            self.wait()?;
            self.reap(now == MEASURED)?;
        }
    }

    /// Have as many requests under way as the load is deep.
    fn fill(&mut self) {
        let start = Instant::now();
        while let Some(slot) = self.free.pop() {
            let (kind, block) = self.choose();
            let sector = ((self.area.first + block) * SECTORS_PER_BLOCK) as u64;
            let mut compare = None;
            match kind {
                OUT => {
                    for block in block..block + self.blocks() {
                        self.versions[block] += 1;
                        self.changing[block] = true;
                    }
                    let versions = &self.versions;
                    self.ring.stamp(slot, sector, |at| versions[block + at / SECTORS_PER_BLOCK]);
                }
                IN if self.counts.requests.is_multiple_of(SAMPLE) => {
                    // What the device does not write must not pass for data.
                    self.ring.stamp(slot, NOWHERE, |_| 0);
                    compare = Some(self.versions[block] - u32::from(self.changing[block]));
                }
                _ => {}
            }
            self.counts.requests += 1;
            self.ring.put(slot, kind, if kind == FLUSH { 0 } else { sector });
            self.under_way[slot] = UnderWay { kind, block, start, compare };
        }
        self.ring.kick();
    }

    /// Blocks of a request.
    fn blocks(&self) -> usize {
        self.load.size / BLOCK
    }

    /// A request's type and first block.
    fn choose(&mut self) -> (u32, usize) {
        let turn = self.counts.requests;
        let kind = match self.load.pattern {
            Pattern::RandomRead | Pattern::SequentialRead => IN,
            Pattern::RandomWrite | Pattern::SequentialWrite => OUT,
            Pattern::Mixed => {
                if self.draw(10) < 7 {
                    IN
                } else {
                    OUT
                }
            }
            Pattern::FlushHeavy if turn % 9 == 8 => return (FLUSH, 0),
            Pattern::FlushHeavy => OUT,
        };
        let places = self.area.count / self.blocks() / self.area.stride;
        loop {
            let place = match self.load.pattern {
                Pattern::SequentialRead | Pattern::SequentialWrite => {
                    self.next += 1;
                    self.next % places
                }
                _ => self.draw(places),
            };
            let block = place * self.area.stride * self.blocks();
            // Of two writes at a time nobody could say which is the later one.
            if kind != OUT || !self.changing[block] {
                return (kind, block);
            }
        }
    }

    fn draw(&mut self, below: usize) -> usize {
        // xorshift64*, and the high bits of a product in place of a remainder.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let word = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        ((u128::from(word) * below as u128) >> 64) as usize
    }

    /// Wait until there is an answer.
    fn wait(&mut self) -> Result<(), String> {
        let late = || format!("no answer within {ANSWER_LIMIT:?}");
        let start = Instant::now();
        if self.load.polled {
            while self.ring.is_empty() {
                for _ in 0..SPINS {
                    if !self.ring.is_empty() {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
                if start.elapsed() > ANSWER_LIMIT {
                    return Err(late());
                }
            }
            return Ok(());
        }
        while self.ring.arm() {
            let limit = i32::try_from(ANSWER_LIMIT.as_millis()).expect("seconds");
            match self.called.wait(limit, &mut [EpollEvent::default()]) {
                Ok(0) => return Err(late()),
                Ok(_) => drop(self.ring.call.read()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("epoll: {error}")),
            }
        }
        Ok(())
    }

    fn reap(&mut self, measured: bool) -> Result<(), String> {
        let now = Instant::now();
        while let Some((slot, status)) = self.ring.take()? {
            let UnderWay { kind, block, start, compare } = self.under_way[slot];
            let sector = ((self.area.first + block) * SECTORS_PER_BLOCK) as u64;
            if status != 0 {
                return Err(format!("a request of type {kind} to sector {sector} ended with status {status}"));
            }
            if kind == OUT {
                let end = block + self.blocks();
                self.changing[block..end].fill(false);
            }
            if let Some(oldest) = compare {
                // Only loads of single blocks read what they write.
                let newest = |at: usize| self.versions[block + at / SECTORS_PER_BLOCK];
                let oldest = |at: usize| if self.blocks() == 1 { oldest } else { newest(at) };
                self.ring.check(slot, sector, |at| oldest(at)..=newest(at))?;
                self.counts.checked += 1;
            }
            self.free.push(slot);
            if measured {
                self.counts.measured += 1;
                let nanos = u64::try_from((now - start).as_nanos()).expect("seconds");
                self.counts.times.saturating_record(nanos);
            }
        }
        Ok(())
    }
}
