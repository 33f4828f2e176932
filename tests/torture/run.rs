//! One run: serve, work, kill, look, serve again, compare.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;
use uuid::Uuid;
use vhost_remap::control::api::ListPage;
use vhost_remap::control::client::Client;
use vhost_remap::volume::layout::Layout;

use crate::counts::Counts;
use crate::expected::Expected;
use crate::killer::{Kill, Killed, Killer, When};
use crate::model::Random;
use crate::sector::{Run, Stamp};
use crate::server::{Server, Starting, Volume};
use crate::slow_disk::SlowDisks;
use crate::spare::{Look, Spare};
use crate::trouble::{Operator, Trouble};
use crate::workload::{Io, SECTORS_MAX, Unread, Workload};

const VOLUME_MIB: u64 = 64;
const SECTORS: u64 = VOLUME_MIB * 2048;
/// Where the guest works: clear of what a probe of the device reads.
const AREA: Range<u64> = 16_384..40_960;
/// Slots for all its blocks, and for many that are retired.
const SLOTS: u32 = 8192;

/// The whole volume is read after so many kills, else what the guest works on.
const WHOLE_EVERY: u64 = 50;
const REPORT_EVERY: u64 = 100;

/// Longest an answer of the control socket takes.
const LIMIT: Duration = Duration::from_secs(30);

/// How far a server got before it was killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Opening,
    Reading,
    Working,
}

/// A server that was started.
struct Started {
    starting: Starting,
    dir: TempDir,
    on_slow: bool,
}

struct Torture {
    /// For servers and kills.
    plan: Random,
    /// For requests and faults: how many it is asked for depends on the time.
    random: Random,
    expected: Expected,
    guest: Workload,
    /// Of the next write.
    sequence: u64,
    /// Writes of guests that are gone, which had no answer: the next guest writes there first.
    given_up: Vec<Range<u64>>,
    stage: Stage,
    /// The spare as the last kill left it.
    look: Look,
    first_sequence: u64,
    set: Uuid,
    counts: Counts,
    /// Their mounts go before the directory.
    disks: Option<Arc<SlowDisks>>,
    volume: Volume,
}

/// Print past the test harness, which would keep it to itself until the end.
pub(crate) fn say(what: impl std::fmt::Display) {
    let _ = writeln!(io::stdout(), "torture: {what}");
}

/// Kill so many servers.
pub(crate) fn torture(kills: u64, seed: u64, disks: impl FnOnce(&Volume) -> Option<SlowDisks>) {
    let began = Instant::now();
    let mut torture = Torture::new(seed, disks);
    let mut started = torture.start(false);
    let mut reported = 0;
    while torture.counts.kills < kills {
        started = torture.round(started);
        if torture.counts.kills >= reported + REPORT_EVERY {
            reported = torture.counts.kills;
            say(torture.report(began));
        }
    }
    torture.finish(started);
    say(torture.report(began));
    torture.counts.check(torture.disks.is_some());
}

impl Torture {
    fn new(seed: u64, disks: impl FnOnce(&Volume) -> Option<SlowDisks>) -> Torture {
        let volume = Volume::create(VOLUME_MIB, SLOTS);
        let server = volume.serve(&[]);
        let set = Uuid::parse_str(&server.status().volume).expect("a UUID");
        server.stop();
        let mut plan = Random(seed);
        let (run, random) = (Run(plan.next()), Random(plan.next()));
        let disks = disks(&volume).map(Arc::new);
        let mut torture = Torture {
            plan,
            random,
            expected: Expected::zeros(run, 0..SECTORS),
            guest: Workload::new(1, true, true, true),
            sequence: 0,
            given_up: Vec::new(),
            stage: Stage::Opening,
            look: Look::default(),
            first_sequence: 0,
            set,
            counts: Counts::default(),
            disks,
            volume,
        };
        torture.look = torture.look();
        torture.first_sequence = torture.look.sequence;
        torture.new_guest();
        torture
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.plan.below(one_in) == 0
    }

    fn within_ms(&mut self, ms: u64) -> Duration {
        Duration::from_micros(self.plan.below(ms * 1000))
    }

    fn report(&self, began: Instant) -> String {
        self.counts.report(self.expected.verified, self.look.live.len(), self.look.retired, began)
    }

    /// A guest with a memory of its own, whose front-end keeps an in-flight region or does not.
    fn new_guest(&mut self) {
        let queues = 2 + usize::try_from(self.plan.below(3)).expect("small");
        let (tracked, event_idx) = (!self.chance(3), !self.chance(4));
        let packed = tracked && self.chance(2);
        let before = std::mem::replace(&mut self.guest, Workload::new(queues, tracked, event_idx, packed));
        self.given_up.extend(before.give_up());
        self.counts.guests += 1;
    }

    /// Start a server, on sockets of its own: the one before may not be gone.
    fn start(&mut self, on_slow: bool) -> Started {
        let dir = tempfile::tempdir_in(self.volume.dir.path()).expect("a directory");
        let slow = self.disks.as_ref().filter(|_| on_slow);
        let paths = slow.map_or([&*self.volume.primary, &*self.volume.spare], |disks| disks.paths());
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-remap"));
        command.arg("serve").arg("--primary").arg(paths[0]).arg("--spare").arg(paths[1]);
        command.arg("--socket-path").arg(dir.path().join("vm.sock")).arg("--fault-injection");
        if self.chance(4) {
            command.args(["--io-engine", "threads"]);
        }
        Started { starting: Starting::spawn(command, dir.path()), dir, on_slow }
    }

    fn look(&self) -> Look {
        let unanswered = self.guest.unanswered_writes();
        let stamps: BTreeSet<Stamp> =
            unanswered.iter().filter_map(|io| if let Io::Write(_, stamp) = io { Some(*stamp) } else { None }).collect();
        Spare::open(&self.volume.spare, SLOTS, self.set, self.expected.run).look(&stamps, SECTORS / 8)
    }

    /// One server's life; its successor.
    fn round(&mut self, started: Started) -> Started {
        let Started { starting, dir: _dir, on_slow } = started;
        let disks = self.disks.clone().filter(|_| on_slow);
        let killer = Killer::arm(starting.server.pid(), Signal::KILL, disks);
        if self.chance(5) {
            let after = self.within_ms(if on_slow { 400 } else { 150 });
            killer.order(When { after, hold_before: None });
        }
        self.stage = Stage::Opening;
        let server = match starting.wait() {
            Ok(server) => server,
            Err(output) => {
                check_killed(&output, &killer);
                killer.join();
                self.note_opening();
                return self.next(on_slow);
            }
        };
        let ctl = server.ctl.clone();
        let client = Client::new(&ctl).expect("an event loop");
        let mut operator = None;
        let Err(Killed) = self.serve(&server, &client, &killer, on_slow, &mut operator);
        self.guest.disconnect();
        let kill = killer.join().expect("it was killed");
        let next = self.bury(server, kill, on_slow);
        operator.into_iter().for_each(Operator::end);
        next
    }

    /// From the connection to the kill.
    fn serve(
        &mut self,
        server: &Server,
        client: &Client,
        killer: &Killer,
        on_slow: bool,
        operator: &mut Option<Operator>,
    ) -> Result<std::convert::Infallible, Killed> {
        self.guest.connect(&server.socket, killer)?;
        self.stage = Stage::Reading;
        let left = self.guest.in_flight_at(Instant::now());
        let Torture { guest, expected, random, .. } = self;
        // What a server had when it was killed the next one answers, once.
        guest.drive(killer, expected, random, |_, _| None)?;
        self.counts.resubmitted += left as u64;
        let whole = self.counts.kills % WHOLE_EVERY == WHOLE_EVERY - 1;
        self.compare(if whole { 0..SECTORS } else { AREA }, client, killer)?;
        self.write_over_given_up(killer)?;
        let layout = self.layout();
        let trouble = Trouble::make(&mut self.random, &AREA, &layout, &self.look);
        trouble.unreadable.iter().for_each(|sectors| self.expected.break_reads(sectors.clone()));
        let disks = self.disks.as_ref().filter(|_| on_slow);
        disks.into_iter().for_each(|disks| disks.fail_writes(&trouble.bad));
        self.stage = Stage::Working;
        let rules = trouble.rules(disks.is_none());
        *operator = Some(Operator::begin(&server.ctl, rules, &AREA, Random(self.plan.next())));
        let hold_before = (on_slow && !self.chance(3)).then(|| self.within_ms(60));
        let after = Duration::from_millis(20) + self.within_ms(400);
        killer.order(When { after, hold_before });
        self.work(&trouble, killer)?;
        unreachable!("there is always something to do")
    }

    fn layout(&self) -> Layout {
        let len = std::fs::metadata(&self.volume.spare).expect("the spare").len();
        Layout::new(len, SLOTS).expect("as it was made")
    }

    /// Read it all and compare; rewrite what is lost.
    fn compare(&mut self, sectors: Range<u64>, client: &Client, killer: &Killer) -> Result<(), Killed> {
        let cuts = |step: u64, range: Range<u64>| {
            let Range { start, end } = range;
            (start..end).step_by(usize::try_from(step).expect("small")).map(move |at| at..(at + step).min(end))
        };
        let sectors_read = sectors.end - sectors.start;
        let Torture { guest, expected, random, .. } = self;
        let mut reads = cuts(SECTORS_MAX, sectors);
        let failed = guest.drive(killer, expected, random, |_, _| reads.next().map(Io::Read))?;
        let mut reads = failed.into_iter().flat_map(|Unread(sectors)| cuts(1, sectors));
        let failed = guest.drive(killer, expected, random, |_, _| reads.next().map(Io::Read))?;
        let failed: BTreeSet<u64> = failed.into_iter().map(|Unread(sector)| sector.start).collect();
        if failed.is_empty() && sectors_read < SECTORS {
            return Ok(());
        }
        let list = client.get::<ListPage>("/v1/list?filter=lost", LIMIT);
        let list = list.map_err(|error| killer.expect_kill(&format!("no list: {error}")))?;
        let lost: BTreeSet<u64> = list.entries.into_iter().flat_map(|entry| entry.lost).collect();
        assert_eq!(failed, lost, "what fails without a fault is lost, and nothing else");
        self.counts.lost += lost.len() as u64;
        let writes = lost.into_iter().map(|sector| sector..sector + 1).collect();
        self.write_all(writes, killer)
    }

    fn write_all(&mut self, ranges: Vec<Range<u64>>, killer: &Killer) -> Result<(), Killed> {
        let Torture { guest, expected, random, sequence, .. } = self;
        let mut ranges = ranges.into_iter();
        let write = |queue: usize, _: &mut Random| {
            *sequence += 1;
            Some(Io::Write(ranges.next()?, Stamp::new(*sequence, queue)))
        };
        guest.drive(killer, expected, random, write).map(drop)
    }

    /// O4: should a write that a dead server left behind still land, it lands on these.
    fn write_over_given_up(&mut self, killer: &Killer) -> Result<(), Killed> {
        let mut ranges = std::mem::take(&mut self.given_up);
        ranges.retain(|_| self.random.below(4) > 0);
        self.write_all(ranges, killer)
    }

    fn work(&mut self, trouble: &Trouble, killer: &Killer) -> Result<(), Killed> {
        let Torture { guest, expected, random, sequence, .. } = self;
        let next = |queue: usize, random: &mut Random| {
            let sectors = trouble.aim(random, &AREA);
            *sequence += 1;
            Some(match random.below(64) {
                0..2 => Io::Flush,
                2..5 => Io::Zero(sectors, random.below(2) == 0),
                5 => Io::Discard(sectors),
                6..22 => Io::Read(sectors),
                _ => Io::Write(sectors, Stamp::new(*sequence, queue)),
            })
        };
        guest.drive(killer, expected, random, next).map(drop)
    }

    /// After a kill: let the kernel finish, see what there is, and start the next server.
    fn bury(&mut self, server: Server, kill: Kill, on_slow: bool) -> Started {
        let mut unread = Vec::new();
        let mut successor = None;
        if kill.in_kernel > 0 {
            let disks = self.disks.clone().expect("slow disks hold it");
            // O4: the successor waits until the kernel has let go of what the killed one had begun. However long
            // that takes; it has to have had the time to do something wrong.
            let next = self.start(true);
            std::thread::sleep(Duration::from_millis(50) + self.within_ms(250));
            assert!(disks.held() > 0, "the kernel still has it");
            assert!(
                !next.dir.path().join("vm.sock").exists(),
                "a successor serves while I/O of the killed server is under way"
            );
            successor = Some(next);
            self.counts.in_kernel += 1;
            self.counts.operations_in_kernel += kill.in_kernel as u64;
        }
        let early_look = successor.is_some().then(|| {
            self.guest.take_answers(&mut self.expected, &mut unread);
            self.look()
        });
        if let Some(disks) = &self.disks {
            disks.release();
            disks.fail_writes(&[]);
        }
        server.kill();
        self.guest.take_answers(&mut self.expected, &mut unread);
        let look = early_look.unwrap_or_else(|| self.look());
        self.note(kill, look);
        self.expected.crashed();
        if !self.guest.device.tracked || self.chance(5) {
            self.new_guest();
        }
        match successor {
            Some(next) => next,
            None => self.next(on_slow),
        }
    }

    fn next(&mut self, after_slow: bool) -> Started {
        let one_in = if after_slow { 3 } else { 8 };
        let on_slow = self.disks.is_some() && self.chance(one_in);
        self.start(on_slow)
    }

    fn note_opening(&mut self) {
        self.counts.opening += 1;
        self.counts.repairing += u64::from(self.look.uneven);
        self.look = self.look();
    }

    fn note(&mut self, kill: Kill, look: Look) {
        let counts = &mut self.counts;
        let in_flight = self.guest.in_flight_at(kill.at) as u64;
        counts.answered += std::mem::take(&mut self.guest.answered);
        if self.stage == Stage::Opening {
            self.look = look;
            return self.note_opening();
        }
        counts.kills += 1;
        counts.early += u64::from(self.stage == Stage::Reading);
        counts.in_flight += u64::from(in_flight > 0);
        counts.requests_in_flight += in_flight;
        // What an earlier kill has left there says nothing of this one.
        let before_map = look.unnamed.difference(&self.look.unnamed).next().is_some();
        counts.before_map += u64::from(before_map);
        counts.half_map += u64::from(look.half_written);
        let in_commit = before_map || look.half_written;
        counts.in_commit += u64::from(in_commit);
        counts.before_answer += u64::from(look.unanswered && !in_commit);
        counts.commits += look.sequence - self.look.sequence;
        self.look = look;
    }

    /// The last server lives, and closes cleanly; what it leaves is compared once more, through another driver.
    fn finish(&mut self, started: Started) {
        let Started { starting, dir: _dir, .. } = started;
        let killer = Killer::arm(starting.server.pid(), Signal::KILL, None);
        let server = starting.wait().unwrap_or_else(|output| panic!("{output:?}"));
        let client = Client::new(&server.ctl).expect("an event loop");
        self.guest.connect(&server.socket, &killer).expect("nobody kills it");
        let Torture { guest, expected, random, .. } = self;
        guest.drive(&killer, expected, random, |_, _| None).expect("nobody kills it");
        self.compare(0..SECTORS, &client, &killer).expect("nobody kills it");
        killer.join();
        self.guest.disconnect();
        self.counts.answered += std::mem::take(&mut self.guest.answered);
        check_map(&server);
        server.stop();
        self.look = self.look();
        assert!(!self.look.uneven, "a clean close leaves all homes alike");
        let server = self.volume.serve(&[]);
        check_map(&server);
        assert_eq!(server.status().blocks.remapped, self.look.live.len() as u64);
        let mut guest = server.guest(1);
        for start in (0..SECTORS).step_by(2048) {
            let data = guest.read(start, 2048).unwrap_or_else(|failed| panic!("sector {start}: {failed:?}"));
            self.expected.check(&(start..start + 2048), &data);
        }
        drop(guest);
        server.stop();
    }
}

/// The volume is well, and no slot serves two blocks.
fn check_map(server: &Server) {
    assert_eq!(server.status().state, ["ok"]);
    let mut slots = BTreeMap::new();
    for entry in server.list() {
        let Some(slot) = entry.slot else { continue };
        let other = slots.insert(slot, entry.sector);
        assert!(other.is_none(), "slot {slot} serves the blocks at {other:?} and {}", entry.sector);
    }
}

/// A server that did not come up was killed, and had nothing else to say.
fn check_killed(output: &Output, killer: &Killer) {
    let is_killed = killer.has_killed() && output.status.signal() == Some(9);
    assert!(
        is_killed,
        "the server does not open its volume: {:?}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
