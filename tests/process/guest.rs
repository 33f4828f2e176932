//! The guest's side: a virtio-blk driver over the vhost-user socket.
//!
//! Transport and rings are those of the `virtio-driver` crate, which shares no code with the server. The
//! requests are made here, because its `VirtioBlkQueue` can send neither several segments in one request
//! nor anything that is wrong on purpose; one test drives that queue as it comes.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioFeatureFlags, VirtioTransport,
    iovec,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// No request of these tests takes longer, retries and held requests included.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

const QUEUE_SIZE: u16 = 256;
/// Memory for the data of one queue's requests: several of 1 MiB.
const DATA_LEN: usize = 8 << 20;
const SECTOR: usize = 512;

/// A request, addressed in sectors.
#[derive(Clone, Debug)]
pub(crate) enum Io {
    Read {
        sector: u64,
        count: u64,
    },
    Write {
        sector: u64,
        data: Vec<u8>,
    },
    Flush,
    /// First sector, sectors, flags of each segment.
    Discard(Vec<(u64, u32, u32)>),
    /// As for `Discard`.
    WriteZeroes(Vec<(u64, u32, u32)>),
    /// Anything: type, sector, bytes to the device, number of bytes from the device.
    Raw {
        kind: u32,
        sector: u64,
        readable: Vec<u8>,
        writable: usize,
    },
}

/// A status that is not OK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    IoErr,
    Unsupp,
    /// No status of virtio-blk.
    Odd(u8),
}

/// What came back: the bytes from the device.
pub(crate) type Reply = Result<Vec<u8>, Failed>;

/// Header and status as the device sees them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Shared {
    header: [u8; 16],
    status: u8,
}

type Transport = VhostUser<VirtioBlkConfig, Shared>;

/// Memory that guest and device share. Its mapping stays where it is until the last queue is gone.
struct Memory {
    region: MmapRegion,
    _file: File,
}

/// A connected front-end with its queues.
pub(crate) struct Guest {
    pub(crate) queues: Vec<Queue>,
    pub(crate) config: VirtioBlkConfig,
    pub(crate) features: u64,
    /// Queues on offer.
    pub(crate) max_queues: usize,
    /// Last: the connection ends with it.
    _transport: Transport,
}

/// How buffers lie in guest memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shape {
    /// Bytes by which buffers miss a page boundary.
    pub(crate) skew: usize,
    /// Bytes of each piece of a buffer; 0 for one piece.
    pub(crate) pieces: usize,
}

/// One queue and the part of guest memory its buffers are in.
pub(crate) struct Queue {
    ring: Virtqueue<'static, Shared>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    data_start: usize,
    data_used: usize,
    /// Requests under way: token, place of the bytes from the device, by the head of their chain.
    under_way: BTreeMap<u16, (u64, usize, usize)>,
    next_token: u64,
    pub(crate) shape: Shape,
    /// After the ring that points into it.
    memory: Arc<Memory>,
}

impl Guest {
    /// Connect, negotiate everything this driver knows, and set up queues.
    pub(crate) fn connect(socket: &Path, queues: usize) -> Guest {
        Guest::connect_with(socket, queues, VirtioBlkFeatureFlags::all())
    }

    /// Connect with these features of virtio-blk only.
    pub(crate) fn connect_with(socket: &Path, queues: usize, wanted_of_blk: VirtioBlkFeatureFlags) -> Guest {
        Guest::connect_over(socket, queues, wanted_of_blk, VirtioFeatureFlags::RING_EVENT_IDX)
    }

    /// Connect with rings of that kind. Of packed ones the driver takes no requests that fail.
    pub(crate) fn connect_over(
        socket: &Path,
        queues: usize,
        wanted_of_blk: VirtioBlkFeatureFlags,
        of_rings: VirtioFeatureFlags,
    ) -> Guest {
        let wanted = VirtioFeatureFlags::VERSION_1 | of_rings;
        let path = socket.to_str().expect("a UTF-8 path");
        let mut transport = Transport::new(path, wanted.bits() | wanted_of_blk.bits()).expect("a vhost-user back-end");
        let features = transport.get_features();
        let flags = VirtioFeatureFlags::from_bits_truncate(features);
        let layout = VirtqueueLayout::new::<Shared>(queues, usize::from(QUEUE_SIZE), flags).expect("a legal size");
        let rings_len = (layout.end_offset * queues).next_multiple_of(4096);
        let memory = Arc::new(Memory::new(rings_len + queues * DATA_LEN));
        let (start, len) = (memory.region.as_ptr() as usize, memory.region.len());
        transport.map_mem_region(start, len, memory._file.as_raw_fd(), 0).expect("the back-end maps guest memory");
        let rings: Vec<_> = (0..queues)
            .map(|index| {
                let at = memory.region.as_ptr().wrapping_add(index * layout.end_offset);
                // SAFETY: the bytes belong to this ring alone; the mapping outlives it, as each `Queue` drops
                // its ring before its share of `memory`. What the device writes there the ring reads atomically
                // or after an acquire load.
                let part = unsafe { std::slice::from_raw_parts_mut(at, layout.end_offset) };
                Virtqueue::new(transport.iova_translator(), part, QUEUE_SIZE, flags).expect("the memory is enough")
            })
            .collect();
        transport.setup_queues(&rings).expect("the back-end starts the queues");
        let queues = rings
            .into_iter()
            .enumerate()
            .map(|(index, mut ring)| {
                ring.set_used_notif_enabled(true);
                Queue {
                    ring,
                    kick: transport.get_submission_notifier(index),
                    call: transport.get_completion_fd(index),
                    data_start: rings_len + index * DATA_LEN,
                    data_used: 0,
                    under_way: BTreeMap::new(),
                    next_token: 0,
                    shape: Shape::default(),
                    memory: memory.clone(),
                }
            })
            .collect();
        let config = transport.get_config().expect("the back-end has a configuration");
        let max_queues = transport.max_queues().expect("MQ is offered");
        Guest { queues, config, features, max_queues, _transport: transport }
    }

    /// The first queue, for tests that need no more.
    pub(crate) fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    pub(crate) fn read(&mut self, sector: u64, count: u64) -> Reply {
        self.queue().one(Io::Read { sector, count })
    }

    pub(crate) fn write(&mut self, sector: u64, data: Vec<u8>) -> Result<(), Failed> {
        self.queue().one(Io::Write { sector, data }).map(drop)
    }

    pub(crate) fn flush(&mut self) -> Result<(), Failed> {
        self.queue().one(Io::Flush).map(drop)
    }
}

impl Memory {
    fn new(len: usize) -> Memory {
        let fd = rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let file = File::from(fd);
        file.set_len(len as u64).expect("memory");
        let again = file.try_clone().expect("a descriptor");
        let region = MmapRegion::from_file(FileOffset::new(file, 0), len).expect("a mapping");
        Memory { region, _file: again }
    }
}

impl Queue {
    /// Send one request and wait for its end.
    pub(crate) fn one(&mut self, io: Io) -> Reply {
        self.run(&[io]).pop().expect("one answer")
    }

    /// Send requests, as many at a time as fit, and wait for all; answers in the order of the requests.
    pub(crate) fn run(&mut self, requests: &[Io]) -> Vec<Reply> {
        let mut waiting: VecDeque<(usize, &Io)> = requests.iter().enumerate().collect();
        let mut tokens = BTreeMap::new();
        let mut replies: Vec<Option<Reply>> = vec![None; requests.len()];
        while !waiting.is_empty() || !tokens.is_empty() {
            while let Some((index, io)) = waiting.front().copied() {
                let Some(token) = self.try_submit(io) else { break };
                tokens.insert(token, index);
                waiting.pop_front();
            }
            self.kick();
            for (token, reply) in self.wait() {
                let index = tokens.remove(&token).expect("an answer to a request of this run");
                replies[index] = Some(reply);
            }
        }
        replies.into_iter().map(|reply| reply.expect("all were answered")).collect()
    }

    /// Put a request into the ring and tell the device. The answer comes from [`Queue::wait`].
    pub(crate) fn submit(&mut self, io: &Io) -> u64 {
        let token = self.try_submit(io).expect("room in the ring");
        self.kick();
        token
    }

    fn kick(&self) {
        self.kick.notify().expect("the kick eventfd takes a write");
    }

    /// Wait until at least one request has ended.
    pub(crate) fn wait(&mut self) -> Vec<(u64, Reply)> {
        let ended = self.wait_for(ANSWER_LIMIT);
        assert!(!ended.is_empty(), "{} requests without an answer for {ANSWER_LIMIT:?}", self.under_way.len());
        ended
    }

    /// Requests that end within `limit`; comes back with the first.
    pub(crate) fn wait_for(&mut self, limit: Duration) -> Vec<(u64, Reply)> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.reap();
            if !ended.is_empty() {
                return ended;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("seconds");
            let ready = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&timeout));
            match ready {
                Ok(0) => return Vec::new(),
                Ok(_) => drop(self.call.read().expect("a readable eventfd")),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => panic!("poll: {error}"),
            }
        }
    }

    fn reap(&mut self) -> Vec<(u64, Reply)> {
        let mut ended = Vec::new();
        let Queue { ring, under_way, memory, .. } = self;
        for completion in ring.completions() {
            let (token, at, len) = under_way.remove(&completion.id).expect("a chain that was made available");
            let reply = match completion.req.status {
                0 => {
                    let mut data = vec![0; len];
                    memory.region.read_slice_at(at, &mut data);
                    Ok(data)
                }
                1 => Err(Failed::IoErr),
                2 => Err(Failed::Unsupp),
                status => Err(Failed::Odd(status)),
            };
            ended.push((token, reply));
        }
        if self.under_way.is_empty() {
            self.data_used = 0;
        }
        ended
    }

    /// `None` where ring or memory are full for now.
    fn try_submit(&mut self, io: &Io) -> Option<u64> {
        let (kind, sector, readable, writable) = lower(io);
        let (out_at, in_at) = (self.allocate(readable.len())?, self.allocate(writable)?);
        self.memory.region.write_slice_at(out_at, &readable);
        // What the device does not write must not pass for data.
        self.memory.region.write_slice_at(in_at, &vec![0xee; writable]);
        let mut buffers = self.pieces(out_at, readable.len(), false);
        buffers.extend(self.pieces(in_at, writable, true));
        let head = self.ring.add_request(|shared, add| {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            *shared = Shared { header, status: 0xff };
            add(iovec { iov_base: (&raw mut shared.header).cast(), iov_len: 16 }, false)?;
            for (buffer, from_device) in &buffers {
                add(*buffer, *from_device)?;
            }
            add(iovec { iov_base: (&raw mut shared.status).cast(), iov_len: 1 }, true)
        });
        let head = match head {
            Ok(head) => head,
            Err(error) if self.under_way.is_empty() => panic!("{} buffers never fit: {error}", buffers.len()),
            Err(_) => return None,
        };
        let token = self.next_token;
        self.next_token += 1;
        self.under_way.insert(head, (token, in_at, writable));
        Some(token)
    }

    fn allocate(&mut self, len: usize) -> Option<usize> {
        let start = self.data_used.next_multiple_of(4096) + self.shape.skew;
        if start + len > DATA_LEN {
            assert!(!self.under_way.is_empty(), "a request of {len} bytes never fits");
            return None;
        }
        self.data_used = start + len;
        Some(self.data_start + start)
    }

    fn pieces(&self, at: usize, len: usize, from_device: bool) -> Vec<(iovec, bool)> {
        let piece = if self.shape.pieces == 0 { len.max(1) } else { self.shape.pieces };
        let base = self.memory.region.as_ptr();
        let cuts = (0..len).step_by(piece);
        cuts.map(|from| {
            let iov_base = base.wrapping_add(at + from).cast();
            (iovec { iov_base, iov_len: piece.min(len - from) }, from_device)
        })
        .collect()
    }
}

fn lower(io: &Io) -> (u32, u64, Vec<u8>, usize) {
    let segments = |segments: &[(u64, u32, u32)]| {
        let mut bytes = Vec::new();
        for (sector, count, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        bytes
    };
    match io {
        Io::Read { sector, count } => (0, *sector, Vec::new(), usize::try_from(*count).expect("small") * SECTOR),
        Io::Write { sector, data } => (1, *sector, data.clone(), 0),
        Io::Flush => (4, 0, Vec::new(), 0),
        Io::Discard(list) => (11, 0, segments(list), 0),
        Io::WriteZeroes(list) => (13, 0, segments(list), 0),
        Io::Raw { kind, sector, readable, writable } => (*kind, *sector, readable.clone(), *writable),
    }
}

/// Copies in and out of memory that the device may change.
trait SharedBytes {
    fn read_slice_at(&self, at: usize, data: &mut [u8]);
    fn write_slice_at(&self, at: usize, data: &[u8]);
}

impl SharedBytes for MmapRegion {
    fn read_slice_at(&self, at: usize, data: &mut [u8]) {
        if !data.is_empty() {
            self.as_volatile_slice().read_slice(data, at).expect("within the region");
        }
    }

    fn write_slice_at(&self, at: usize, data: &[u8]) {
        if !data.is_empty() {
            self.as_volatile_slice().write_slice(data, at).expect("within the region");
        }
    }
}
