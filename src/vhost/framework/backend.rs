//! A [`BlkDevice`] as the framework's daemon sees it, for one connection: kicks are passed on to the lanes.

use std::io;
use std::sync::{Arc, PoisonError};

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringRwLock};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::lane::{Order, Vring};
use crate::runtime::mailbox::Outbox;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::mpsc::channel;
use crate::sync::{Mutex, MutexGuard};
use crate::vhost::QUEUE_SIZE_MAX;
use crate::vhost::command::wait;
use crate::vhost::device::BlkDevice;
use crate::vhost::inflight::INFLIGHT_MIGRATION;
use crate::vhost::protocol;
use crate::vhost::worker::StopHow;

/// The vrings that lanes have been told of.
struct Known {
    /// By the queue's number in the device.
    vrings: Vec<Option<Arc<Vring>>>,
    /// The connection ends: no lane hears of a kick any more.
    closed: bool,
}

/// One device for one connection. The daemon's thread number `t` of `n` has queues `t`, `t + n`, … and lane `t`.
pub(super) struct BlkBackend {
    device: Arc<BlkDevice>,
    lanes: Vec<Outbox<Order>>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    known: Mutex<Known>,
}

impl BlkBackend {
    /// For a daemon that keeps guest memory in `memory`.
    pub(super) fn new(
        device: Arc<BlkDevice>,
        lanes: Vec<Outbox<Order>>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ) -> BlkBackend {
        let vrings = vec![None; usize::from(device.queues())];
        BlkBackend { device, lanes, memory, known: Mutex::new(Known { vrings, closed: false }) }
    }

    /// The end of the connection: comes back when no lane has a request of it.
    pub(super) fn close(&self) {
        self.known().closed = true;
        self.stop_all(StopHow::Leave);
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stop queues, all at once, and wait for them.
    fn stop(&self, numbers: impl Iterator<Item = usize>, how: StopHow) {
        let order_stop = |number: usize| {
            let (reply, stopped) = channel();
            let queue = u16::try_from(number).expect("at most 64 queues");
            self.lanes[number % self.lanes.len()].send(Order::Stop { queue, how, reply });
            (number, stopped)
        };
        for (number, stopped) in numbers.map(order_stop).collect::<Vec<_>>() {
            wait(&stopped, || format!("queue {number}"));
        }
    }

    fn stop_all(&self, how: StopHow) {
        self.stop(0..usize::from(self.device.queues()), how);
    }
}

impl VhostUserBackend for BlkBackend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        usize::from(self.device.queues())
    }

    fn max_queue_size(&self) -> usize {
        usize::from(QUEUE_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        self.device.offered_features()
    }

    fn acked_features(&self, features: u64) {
        self.device.negotiated(features);
    }

    /// What our own transport offers, but for what the daemon wants to know nothing of, and the channel, on which the
    /// crate has no words for a changed configuration.
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let own = INFLIGHT_MIGRATION | VhostUserProtocolFeatures::LOG_SHMFD | VhostUserProtocolFeatures::DEVICE_STATE;
        protocol::FEATURES - own - VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn reset_device(&self) {
        self.stop_all(StopHow::Discard);
        self.device.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Each vring's queue knows, and it is all that needs to.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.device.read_config(offset, size)
    }

    fn set_config(&self, offset: u32, buf: &[u8]) -> io::Result<()> {
        if let Err(error) = self.device.write_config(offset, buf) {
            // An error would end the connection, and what a driver writes here is the guest's choice.
            log::warn!("{error}");
        }
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        // The one given to the daemon, which lanes look at for each batch.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let queues = 0..usize::from(self.device.queues());
        let mask = |thread| {
            let of_thread = queues.clone().filter(|number| number % self.lanes.len() == thread);
            of_thread.fold(0, |mask, number| mask | 1_u64 << number)
        };
        (0..self.lanes.len()).map(mask).collect()
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the daemon never ends.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.stop(usize::try_from(queue_index).into_iter(), StopHow::Drain);
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[VringRwLock],
        thread_id: usize,
    ) -> io::Result<()> {
        // An error would end the daemon's thread without a word, so none leaves this function.
        let at = usize::from(device_event);
        let Some(vring) = vrings.get(at) else { return Ok(()) };
        let number = at * self.lanes.len() + thread_id;
        let mut known = self.known();
        if known.closed {
            return Ok(());
        }
        let vring = known.vrings[number].get_or_insert_with(|| {
            Arc::new(Vring {
                number: u16::try_from(number).expect("at most 64 queues"),
                vring: vring.clone(),
                memory: self.memory.clone(),
                kicked: AtomicBool::new(false),
            })
        });
        // One order for all kicks until the lane looks, so that a guest cannot fill its mailbox.
        if !vring.kicked.swap(true, Ordering::AcqRel) {
            self.lanes[thread_id].send(Order::Look(vring.clone()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
    use vhost_user_backend::VringT;
    use vm_memory::GuestAddressSpace;

    use super::*;
    use crate::vhost::framework::lane::Lane;
    use crate::vhost::status::WorkerStatus;
    use crate::vhost::testing::{Bench, DATA, Guest, chain_from, readable, writable};
    use crate::vhost::thread::{WorkerThread, spawn_worker};

    fn backend(lanes: usize, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> (BlkBackend, Vec<WorkerThread<Order>>) {
        let (device, ports) = Bench::ports(lanes);
        let spawn = |(index, port)| {
            let settings = device.settings();
            let run = move |worker, orders| Lane::new(worker, settings, Arc::new(WorkerStatus::new())).run(orders);
            spawn_worker(index, port, Order::Exit, run).unwrap()
        };
        let threads: Vec<_> = ports.into_iter().enumerate().map(spawn).collect();
        let outboxes = threads.iter().map(|thread| thread.commands.clone()).collect();
        (BlkBackend::new(device, outboxes, memory), threads)
    }

    #[test]
    fn a_vring_of_the_daemon_is_served() {
        let guest = Guest::new(16);
        let memory = GuestMemoryAtomic::new((*guest.memory).clone());
        let (backend, _threads) = backend(1, memory.clone());
        let vring = VringRwLock::new(memory, 16).unwrap();
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let set_up = || {
            let ring = guest.addresses();
            vring.set_queue_info(ring.descriptors, ring.avail, ring.used).unwrap();
            vring.set_queue_size(16);
            vring.set_call(Some(File::from(call.try_clone().unwrap())));
            vring.set_enabled(true);
            vring.set_queue_ready(true);
        };
        set_up();
        guest.write(DATA, &[0; 16]);
        for round in 0..3_u16 {
            for number in 0..4 {
                let buffers = [readable(DATA, 16), writable(DATA + 0x1000, 512), writable(DATA + 64, 1)];
                guest.offer(chain_from(&guest, number * 3, &buffers));
            }
            backend.handle_event(0, EventSet::IN, std::slice::from_ref(&vring), 0).unwrap();
            while guest.used_idx() != guest.avail_idx() {
                let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
                let notified = poll(&mut [PollFd::from_borrowed_fd(call.as_fd(), PollFlags::IN)], Some(&limit));
                assert_eq!(notified, Ok(1), "the requests are not served");
                rustix::io::read(&call, &mut [0_u8; 8]).unwrap();
            }
            for number in 0..4 {
                assert_eq!(guest.take_used(), Some((number * 3, 513)));
            }
            assert_eq!(vring.queue_next_avail(), (round + 1) * 4);
            // As the daemon does for GET_VRING_BASE and the start after it.
            vring.set_queue_ready(false);
            backend.stop_vring(0).unwrap();
            set_up();
        }
        assert!(backend.handle_event(9, EventSet::IN, &[vring], 0).is_ok());
    }

    /// Its rings are those of `virtio-queue`.
    #[test]
    fn packed_rings_are_not_offered() {
        let (backend, _threads) = backend(1, GuestMemoryAtomic::new(GuestMemoryMmap::new()));
        assert_eq!(backend.features() & 1 << 34, 0);
    }

    #[test]
    fn a_closed_connection_lets_go_of_guest_memory() {
        let guest = Guest::new(16);
        let memory = GuestMemoryAtomic::new((*guest.memory).clone());
        let (backend, _threads) = backend(1, memory.clone());
        let vring = VringRwLock::new(memory.clone(), 16).unwrap();
        let of_guest = memory.memory().into_inner();
        backend.handle_event(0, EventSet::IN, std::slice::from_ref(&vring), 0).unwrap();
        backend.close();
        backend.handle_event(0, EventSet::IN, std::slice::from_ref(&vring), 0).unwrap();
        // Ours and that of the atomic itself.
        assert_eq!(Arc::strong_count(&of_guest), 2);
    }

    #[test]
    fn a_lane_that_is_told_to_end_does_so_with_queues_left() {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let (backend, threads) = backend(1, memory.clone());
        let vring = VringRwLock::new(memory, 16).unwrap();
        backend.handle_event(0, EventSet::IN, &[vring], 0).unwrap();
        let (done, ended) = channel();
        std::thread::spawn(move || {
            drop(threads);
            done.send(())
        });
        assert_eq!(ended.recv_timeout(std::time::Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn each_queue_belongs_to_one_thread() {
        for lanes in [1, 2, 3, 64] {
            let (backend, _threads) = backend(lanes, GuestMemoryAtomic::new(GuestMemoryMmap::new()));
            let masks = backend.queues_per_thread();
            assert_eq!(masks.len(), lanes);
            assert_eq!(masks.iter().fold(0, |all, mask| all ^ mask), u64::MAX, "{masks:x?}");
            assert!(masks.iter().all(|mask| mask.count_ones() <= 64_u32.div_ceil(u32::try_from(lanes).unwrap())));
        }
    }
}
