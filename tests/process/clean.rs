//! Healthy disks: what is written is read, at every size and alignment, from several queues at once.

use std::fs;

use vhost_remap::volume::layout::{Layout, Place};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioFeatureFlags, VirtioTransport};

use crate::guest::{Io, Shape};
use crate::model::{Model, Random, pattern};
use crate::server::{Server, TRANSPORTS, Volume};

const VOLUME_MIB: u64 = 64;
const SECTORS: u64 = VOLUME_MIB * 2048;

/// Patterns of all sizes and alignments, against a model; the first sector and the last too.
fn check_patterns(server: &Server) {
    let mut guest = server.guest(1);
    assert_eq!(u64::from(guest.config.capacity), SECTORS);
    let queue = guest.queue();
    let mut model = Model::zeros(0, SECTORS);
    let mut stamp = 0;
    let mut starts = vec![0, 1, 3, 7, 8, 2047, 2048, 4095];
    let mut random = Random(1);
    starts.extend((0..8).map(|_| random.below(SECTORS / 2)));
    for (i, start) in starts.into_iter().enumerate() {
        // Buffers on and off the device's memory alignment, in one piece and in several.
        let skew = [0, 512, 4, 1][i % 4];
        let pieces = [0, 16_384, 65_536, 10_000][i / 2 % 4];
        queue.shape = Shape { skew, pieces };
        for count in [1, 2, 5, 7, 8, 9, 16, 63, 64, 127, 128, 2048] {
            stamp += 1;
            let write = model.write(start, pattern(start, count, stamp));
            queue.one(write).unwrap();
            model.check(queue, start.saturating_sub(1), count + 2);
        }
    }
    for (sector, count) in [(SECTORS - 1, 1), (SECTORS - 8, 8), (SECTORS - 9, 9), (SECTORS - 2048, 2048)] {
        stamp += 1;
        let write = model.write(sector, pattern(sector, count, stamp));
        queue.one(write).unwrap();
        model.check(queue, sector - 1, count + 1);
    }
    queue.one(Io::Flush).unwrap();
    queue.shape = Shape::default();
    model.check_all(queue);
    let status = server.status();
    assert_eq!((status.state, status.blocks.remapped, status.counters.device_errors), (vec!["ok".into()], 0, 0));
}

/// No slot of the spare was written.
fn check_slots_untouched(volume: &Volume) {
    let spare = fs::read(&volume.spare).unwrap();
    let layout = Layout::new(spare.len() as u64, 64).unwrap();
    let range = [layout.slots_start, layout.place_start(Place::Tail)].map(|at| usize::try_from(at).unwrap());
    assert!(spare[range[0]..range[1]].iter().all(|byte| *byte == 0));
}

fn check_clean(engine: &str) {
    let volume = Volume::create(VOLUME_MIB, 64);
    let server = volume.serve(&["--io-engine", engine]);
    check_patterns(&server);
    server.stop();
    check_slots_untouched(&volume);
}

/// Scenarios 1 and 7.
#[test]
fn all_sizes_and_alignments_read_back_with_io_uring() {
    check_clean("io_uring");
}

/// Scenarios 1 and 7.
#[test]
fn all_sizes_and_alignments_read_back_with_threads() {
    check_clean("threads");
}

#[test]
fn all_sizes_and_alignments_read_back_with_the_framework() {
    let volume = Volume::create(VOLUME_MIB, 64);
    check_patterns(&volume.serve(&["--transport", "framework"]));
}

/// Scenario 1 with concurrency: each queue has its own stripes of the disk.
#[test]
fn four_queues_at_once_do_not_disturb_each_other() {
    for transport in TRANSPORTS {
        let volume = Volume::create(VOLUME_MIB, 64);
        check_four_queues(&volume.serve(&["--transport", transport]));
    }
}

fn check_four_queues(server: &Server) {
    let mut guest = server.guest(4);
    std::thread::scope(|scope| {
        for (number, queue) in (0..).zip(&mut guest.queues) {
            scope.spawn(move || {
                let (start, count) = (number * SECTORS / 4, SECTORS / 4);
                let mut model = Model::zeros(start, count);
                let mut random = Random(number);
                for round in 0..20 {
                    // 64 requests at a time that do not overlap: each has its own stripe.
                    let stripe = count / 64;
                    let writes: Vec<Io> = (0..64)
                        .map(|i| {
                            let len = 1 + random.below(64);
                            let sector = start + i * stripe + random.below(stripe - len);
                            model.write(sector, pattern(sector, len, round << 8 | number))
                        })
                        .collect();
                    assert!(queue.run(&writes).iter().all(Result::is_ok));
                    let sector = start + random.below(count - 2048);
                    model.check(queue, sector, 2048);
                }
                queue.one(Io::Flush).unwrap();
                model.check_all(queue);
            });
        }
    });
}

/// The driver as others use it.
#[test]
fn the_stock_virtio_blk_driver_works() {
    for transport in TRANSPORTS {
        let volume = Volume::create(VOLUME_MIB, 64);
        check_stock_driver(&volume.serve(&["--transport", transport]));
    }
}

fn check_stock_driver(server: &Server) {
    let features = VirtioFeatureFlags::VERSION_1.bits() | virtio_driver::VirtioBlkFeatureFlags::all().bits();
    let mut transport = VhostUser::new(server.socket.to_str().unwrap(), features).unwrap();
    let mut queues = VirtioBlkQueue::<u32>::setup_queues(&mut transport, 2, 128).unwrap();
    for (i, queue) in queues.iter_mut().enumerate() {
        queue.set_used_notif_enabled(true);
        queue.flush(1).unwrap();
        queue.discard(1 << 20, 1 << 20, 2).unwrap();
        queue.write_zeroes(4 << 20, 1 << 20, true, 3).unwrap();
        transport.get_submission_notifier(i).notify().unwrap();
        let mut seen = Vec::new();
        while seen.len() < 3 {
            transport.get_completion_fd(i).read().unwrap();
            seen.extend(queue.completions().map(|completion| (completion.context, completion.ret)));
        }
        seen.sort_unstable();
        assert_eq!(seen, [(1, 0), (2, 0), (3, 0)]);
    }
}
