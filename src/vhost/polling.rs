//! Adaptive polling: how long a worker looks at its rings, when nothing comes, before it sleeps.
//!
//! A worker that sleeps costs its guest a kick, and itself a wake-up, with each burst of requests. One that looks
//! on for a while spares both, at the price of its processor. So the time is learnt, as KVM does for halted virtual
//! processors (linux/virt/kvm/kvm_main.c, `kvm_vcpu_halt`): it grows while sleeps are shorter than the limit, and
//! shrinks to nothing while they are longer.

use std::time::Duration;

use crate::units::Time;

/// The least time worth looking on.
const START_NS: u64 = 4_000;

/// What was last seen to happen: any number that differs when something has.
pub(super) type Activity = (u64, usize);

/// The state of one worker's polling.
#[derive(Debug)]
pub(super) struct Polling {
    limit_ns: u64,
    window_ns: u64,
    last: Activity,
    /// When something happened last.
    since: Time,
    /// Whether the worker has slept since.
    slept: bool,
}

impl Polling {
    /// Polling for `limit` at most; never, where that is nothing.
    pub(super) fn new(limit: Duration) -> Polling {
        let limit_ns = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        Polling { limit_ns, window_ns: 0, last: (0, 0), since: Time(0), slept: false }
    }

    /// Whether to look at the rings again, at `now`, rather than to sleep.
    pub(super) fn goes_on(&mut self, now: Time, activity: Activity) -> bool {
        if self.limit_ns == 0 {
            return false;
        }
        let waited = now.since_ns(self.since);
        if activity != self.last {
            if std::mem::take(&mut self.slept) {
                self.learn(waited);
            }
            (self.last, self.since) = (activity, now);
        }
        let goes_on = now.since_ns(self.since) < self.window_ns;
        self.slept |= !goes_on;
        goes_on
    }

    /// A sleep ended that began after so long without anything.
    fn learn(&mut self, waited: u64) {
        self.window_ns = if waited <= self.limit_ns {
            (self.window_ns * 2).clamp(START_NS.min(self.limit_ns), self.limit_ns)
        } else if self.window_ns < 2 * START_NS {
            0
        } else {
            self.window_ns / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(32);

    /// Something happens `pause` after the last time: whether the worker was awake.
    fn after(polling: &mut Polling, now: &mut Time, pause: u64) -> bool {
        let last = polling.last;
        let awake = polling.goes_on(now.plus_ns(pause - 1), last);
        *now = now.plus_ns(pause);
        polling.goes_on(*now, (last.0 + 1, 0));
        awake
    }

    #[test]
    fn polling_grows_while_it_pays_and_ends_when_it_does_not() {
        let (mut polling, mut now) = (Polling::new(LIMIT), Time(0));
        let awake: Vec<bool> = (0..6).map(|_| after(&mut polling, &mut now, 20_000)).collect();
        // 0, 4, 8, 16 and 32 microseconds.
        assert_eq!(awake, [false, false, false, false, true, true]);
        let awake: Vec<bool> = (0..6).map(|_| after(&mut polling, &mut now, 1_000_000)).collect();
        assert_eq!(awake, [false; 6]);
        assert_eq!(polling.window_ns, 0, "an idle worker sleeps at once");
    }

    #[test]
    fn a_worker_that_may_not_poll_sleeps_at_once() {
        let (mut polling, mut now) = (Polling::new(Duration::ZERO), Time(0));
        assert!((0..9).all(|_| !after(&mut polling, &mut now, 2)));
    }

    #[test]
    fn being_woken_for_nothing_changes_nothing() {
        let (mut polling, mut now) = (Polling::new(LIMIT), Time(0));
        (0..6).for_each(|_| _ = after(&mut polling, &mut now, 20_000));
        let window = polling.window_ns;
        assert!((1..9).all(|n| !polling.goes_on(now.plus_ns(n * 1_000_000), polling.last)));
        assert_eq!(polling.window_ns, window);
    }
}
