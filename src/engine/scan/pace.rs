//! How fast a pass goes: as fast as it may while the guest asks for nothing, else slowly enough not to be noticed, and
//! never so slowly that it does not end.
//!
//! To wait until nobody wants the disk, and then to read until somebody does, disturbs least at the same speed
//! (Amvrosiadis, Oprea, Schroeder, DSN 2012); how much is read beside a busy guest goes by what it is seen to cost.

use crate::units::Time;

/// A guest that has asked for nothing so long is idle, in nanoseconds (100 ms).
const IDLE_NS: u64 = 100_000_000;
/// How often the guest is looked at, in nanoseconds (100 ms).
const LOOK_NS: u64 = 100_000_000;
/// Slowest that a pass goes beside a busy guest, in bytes of a second, unless its rate is limited further.
const FLOOR_MIN: u64 = 1 << 20;
/// Fastest that it goes there to end in time: what does not fit a short window takes another one.
const FLOOR_MAX: u64 = 32 << 20;
/// Beside a guest that does not mind, so many times the floor.
const EASY_MAX: u64 = 16;
/// Beyond the floor, one of so many of its requests at most finds a read of a pass before it: what 99 of 100 take then
/// stays as it is.
const MET_AT_MOST: u64 = 200;
/// With more of its requests under way a guest is thought to mind.
const DEPTH_MAX: u64 = 8;
/// Looks at the floor after a guest was seen to mind (5 s).
const BACK_OFF_LOOKS: u32 = 50;
/// Bytes read at a time beside a busy guest: what its requests may have to wait for.
const PIECE_BUSY: u64 = 64 << 10;
/// Bytes read at a time else.
const PIECE_IDLE: u64 = 1 << 20;
/// Reads under way at a time while the guest is idle: enough to keep a disk busy.
const PARALLEL_IDLE: usize = 4;
/// Longest pause after a read that failed, in nanoseconds (10 s).
const PAUSE_MAX_NS: u64 = 10_000_000_000;

/// How the guest is served, as it was measured outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestLoad {
    /// Requests under way.
    pub in_flight: u64,
    /// What 99 of 100 requests of the last time took at most, in nanoseconds; nothing where there were few.
    pub p99_ns: Option<u64>,
    /// Seconds that local time is ahead of UTC.
    pub local_offset: i64,
}

/// The speed of a pass.
#[derive(Clone, Debug)]
pub struct Pace {
    floor: u64,
    cap: Option<u64>,
    /// Beside a busy guest, in bytes of a second.
    speed: u64,
    /// When the next read may begin.
    next: Time,
    looked: Time,
    /// Requests answered until then, and until it was last seen what they are.
    looked_requests: u64,
    requests: u64,
    /// When the guest was last seen to ask for something.
    asked: Time,
    /// What its p99 is beside a pass at the floor, in nanoseconds.
    usual_p99_ns: Option<u64>,
    back_off: u32,
}

impl Pace {
    /// Of a pass that has so many bytes to read, and so many seconds for that, at a rate of `cap` bytes of a second at
    /// most; the guest had so many requests answered until now.
    pub fn new(now: Time, bytes: u64, seconds: Option<u64>, cap: Option<u64>, requests: u64) -> Pace {
        let in_time = bytes / seconds.unwrap_or(u64::MAX).max(1);
        let floor = in_time.clamp(FLOOR_MIN, FLOOR_MAX).min(cap.unwrap_or(u64::MAX)).max(1);
        Pace {
            floor,
            cap,
            speed: floor,
            next: now,
            looked: now,
            looked_requests: requests,
            requests,
            asked: now,
            usual_p99_ns: None,
            back_off: 0,
        }
    }

    /// See what the guest has done: how many of its requests have been answered, and how it is served.
    pub fn look(&mut self, now: Time, requests: u64, load: GuestLoad) {
        if requests != self.requests || load.in_flight > 0 {
            (self.requests, self.asked) = (requests, now);
        }
        if now.since_ns(self.looked) < LOOK_NS {
            return;
        }
        let answered = requests.saturating_sub(std::mem::replace(&mut self.looked_requests, requests));
        let took_ns = now.since_ns(std::mem::replace(&mut self.looked, now));
        if self.is_idle(now) {
            return;
        }
        if self.speed == self.floor
            && let Some(p99) = load.p99_ns
        {
            self.usual_p99_ns = Some(self.usual_p99_ns.map_or(p99, |usual| (usual * 7 + p99) / 8));
        }
        let minds = match (load.p99_ns, self.usual_p99_ns) {
            (Some(p99), Some(usual)) => p99 > usual + usual / 10,
            _ => false,
        };
        if minds || load.in_flight > DEPTH_MAX {
            (self.speed, self.back_off) = (self.floor, BACK_OFF_LOOKS);
        } else if self.back_off > 0 {
            self.back_off -= 1;
        } else {
            // While one read of a pass is under way, so many requests come as are under way.
            let a_second = u128::from(answered) * 1_000_000_000 / u128::from(took_ns);
            let unmet = a_second * u128::from(PIECE_BUSY) / u128::from(MET_AT_MOST * load.in_flight.max(1));
            let most = self.floor.saturating_mul(EASY_MAX).min(u64::try_from(unmet).unwrap_or(u64::MAX));
            let most = most.max(self.floor).min(self.cap.unwrap_or(u64::MAX));
            self.speed = self.speed.saturating_add(self.floor / 4).min(most);
        }
    }

    /// Whether the guest has asked for nothing for a while.
    pub fn is_idle(&self, now: Time) -> bool {
        now.since_ns(self.asked) >= IDLE_NS
    }

    /// Whether the guest is served as it usually is: only then does it say something of a disk that it is slow.
    pub fn is_calm(&self, load: GuestLoad) -> bool {
        load.in_flight <= DEPTH_MAX
            && match (load.p99_ns, self.usual_p99_ns) {
                (Some(p99), Some(usual)) => p99 <= usual * 2,
                _ => true,
            }
    }

    /// Bytes to read at a time, and how many reads at a time.
    pub fn reads(&self, now: Time) -> (u64, usize) {
        if self.is_idle(now) { (PIECE_IDLE, PARALLEL_IDLE) } else { (PIECE_BUSY, 1) }
    }

    /// When reads of so many bytes may begin; they are taken to begin then.
    pub fn begin(&mut self, now: Time, bytes: u64) -> Time {
        let begin = self.next.max(now);
        let speed = if self.is_idle(now) { self.cap } else { Some(self.speed) };
        let took = speed.map_or(0, |speed| u128::from(bytes) * 1_000_000_000 / u128::from(speed));
        self.next = Time(begin.0.saturating_add(u64::try_from(took).unwrap_or(u64::MAX)));
        begin
    }

    /// A read took so many nanoseconds to fail: give the disk, which others wait for too, as long.
    pub fn pause(&mut self, now: Time, took_ns: u64) {
        self.next = self.next.max(Time(now.0 + took_ns.min(PAUSE_MAX_NS)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const MIB: u64 = 1 << 20;

    fn busy(in_flight: u64, p99_ms: u64) -> GuestLoad {
        GuestLoad { in_flight, p99_ns: Some(p99_ms * MS), local_offset: 0 }
    }

    #[test]
    fn a_pass_waits_for_idleness_and_then_goes_at_full_speed() {
        let mut pace = Pace::new(Time(0), 0, None, None, 7);
        assert!(!pace.is_idle(Time(99 * MS)));
        assert_eq!(pace.reads(Time(99 * MS)), (PIECE_BUSY, 1));
        pace.look(Time(100 * MS), 7, GuestLoad::default());
        assert_eq!(pace.reads(Time(100 * MS)), (PIECE_IDLE, PARALLEL_IDLE));
        assert_eq!(pace.begin(Time(100 * MS), 4 * MIB), pace.begin(Time(100 * MS), 4 * MIB));
        // A request that was answered, and one that is under way, keep the guest busy.
        pace.look(Time(150 * MS), 8, GuestLoad::default());
        assert!(!pace.is_idle(Time(249 * MS)) && pace.is_idle(Time(250 * MS)));
        pace.look(Time(250 * MS), 8, GuestLoad { in_flight: 1, ..GuestLoad::default() });
        assert!(!pace.is_idle(Time(349 * MS)));
    }

    #[test]
    fn beside_a_busy_guest_there_is_a_floor_and_it_ends_the_pass_in_time() {
        let day = 86_400;
        let mut pace = Pace::new(Time(0), 864_000 * MIB, Some(day), None, 0);
        let first = pace.begin(Time(0), 10 * MIB);
        assert_eq!((first, pace.begin(Time(0), 1)), (Time(0), Time(1_000_000_000)));
        let mut slow = Pace::new(Time(0), MIB, Some(day), None, 0);
        assert_eq!((slow.begin(Time(0), MIB), slow.begin(Time(0), 1)), (Time(0), Time(1_000_000_000)));
        let mut short = Pace::new(Time(0), 864_000 * MIB, Some(60), None, 0);
        assert_eq!((short.begin(Time(0), 32 * MIB), short.begin(Time(0), 1)), (Time(0), Time(1_000_000_000)));
        // What the operator allows at most goes before.
        let mut least = Pace::new(Time(0), 864_000 * MIB, Some(day), Some(MIB / 2), 0);
        assert_eq!((least.begin(Time(0), MIB), least.begin(Time(0), 1)), (Time(0), Time(2_000_000_000)));
    }

    /// The fastest beside a guest that has so many requests answered in 100 ms.
    fn fastest(pace: &mut Pace, answered: u64, from: u64, looks: u64, load: GuestLoad) -> u64 {
        let look = |i: u64| (pace.look(Time(i * 100 * MS), i * answered, load), pace.speed).1;
        (from + 1..=from + looks).map(look).max().unwrap()
    }

    #[test]
    fn few_requests_of_a_guest_meet_a_read() {
        // 2,000 a second at a time, of which one in 200 meets one of 64 KiB.
        for (in_flight, expected) in [(0, 10 * PIECE_BUSY), (1, 10 * PIECE_BUSY), (8, 10 * PIECE_BUSY / 8)] {
            let mut pace = Pace::new(Time(0), 0, None, None, 0);
            pace.floor = PIECE_BUSY;
            pace.speed = PIECE_BUSY;
            assert_eq!(fastest(&mut pace, 200, 0, 100, busy(in_flight, 10)), expected);
        }
    }

    #[test]
    fn a_guest_that_minds_gets_the_floor() {
        let mut pace = Pace::new(Time(0), 0, None, None, 0);
        let speeds = |pace: &mut Pace, from: u64, looks: u64, load| fastest(pace, 1_000_000, from, looks, load);
        assert_eq!(speeds(&mut pace, 0, 100, busy(1, 10)), EASY_MAX * MIB);
        assert_eq!(speeds(&mut pace, 100, 1, busy(1, 12)), MIB);
        assert_eq!(speeds(&mut pace, 101, u64::from(BACK_OFF_LOOKS), busy(1, 10)), MIB);
        assert!(speeds(&mut pace, 200, 10, busy(1, 10)) > MIB);
        assert_eq!(speeds(&mut pace, 300, 1, busy(DEPTH_MAX + 1, 10)), MIB);
        assert!(pace.is_calm(busy(1, 10)) && !pace.is_calm(busy(1, 40)) && !pace.is_calm(busy(DEPTH_MAX + 1, 1)));
    }

    #[test]
    fn a_pass_rests_as_long_as_a_failing_read_took() {
        let mut pace = Pace::new(Time(0), 0, None, None, 0);
        pace.pause(Time(5), 3 * MS);
        assert_eq!(pace.begin(Time(6), 1), Time(5 + 3 * MS));
        pace.pause(Time(0), u64::MAX);
        assert_eq!(pace.begin(Time(0), 1), Time(PAUSE_MAX_NS));
    }
}
