//! What a run has met, and how much of it there must be.

use std::fmt;
use std::time::Instant;

/// Percent of the kills that must meet requests in flight, and a commit.
const IN_FLIGHT_PERCENT: u64 = 95;
const IN_COMMIT_PERCENT: u64 = 10;

/// So many kills meet what is rare, too.
const MANY: u64 = 200;

/// Counted by kill, if not said otherwise.
#[derive(Default)]
pub(crate) struct Counts {
    /// Of servers that a front-end was connected to.
    pub(crate) kills: u64,
    /// Requests were sent and not answered.
    pub(crate) in_flight: u64,
    /// Such requests.
    pub(crate) requests_in_flight: u64,
    /// Such requests that the next server answered, as they were in the in-flight region.
    pub(crate) resubmitted: u64,
    /// Data of such a request in a slot that the map does not name yet.
    pub(crate) before_map: u64,
    /// The map was written in one place and not yet in the other.
    pub(crate) half_map: u64,
    /// One of these two.
    pub(crate) in_commit: u64,
    /// The map names the slot of a request that was not answered.
    pub(crate) before_answer: u64,
    /// The kernel had operations that it finished after the kill.
    pub(crate) in_kernel: u64,
    /// Such operations.
    pub(crate) operations_in_kernel: u64,
    /// A front-end was connected, and not all was read back yet.
    pub(crate) early: u64,
    /// Beside `kills`: of servers that did not serve yet.
    pub(crate) opening: u64,
    /// Of these: the map had to be repaired.
    pub(crate) repairing: u64,
    /// Lives of guests.
    pub(crate) guests: u64,
    /// Requests answered.
    pub(crate) answered: u64,
    /// Page writes of commits.
    pub(crate) commits: u64,
    /// Sectors found lost, all for a reason.
    pub(crate) lost: u64,
}

impl Counts {
    /// Fail if the run met too little to prove anything.
    pub(crate) fn check(&self, has_slow_disks: bool) {
        let enough = |what: u64, percent: u64| what * 100 >= self.kills * percent;
        assert!(
            enough(self.in_flight, IN_FLIGHT_PERCENT),
            "less than {IN_FLIGHT_PERCENT} % with requests in flight: {self}"
        );
        assert!(enough(self.in_commit, IN_COMMIT_PERCENT), "less than {IN_COMMIT_PERCENT} % inside a commit: {self}");
        assert!(self.resubmitted > 0, "nothing was answered by a next server: {self}");
        if self.kills >= MANY {
            assert!(self.in_kernel > 0 || !has_slow_disks, "no kill with I/O in the kernel: {self}");
            assert!(self.repairing > 0, "no kill while a server repaired what it opened: {self}");
        }
    }

    /// With what is known at the end.
    pub(crate) fn report(&self, verified: u64, live: usize, retired: usize, since: Instant) -> String {
        let seconds = since.elapsed().as_secs_f64();
        let mib = verified / 2048;
        format!(
            "{self}; {} commits of table pages, {live} blocks remapped and {retired} slots retired at the end, \
             {mib} MiB verified, {seconds:.0} s",
            self.commits
        )
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part: u64| part as f64 * 100.0 / self.kills.max(1) as f64;
        write!(
            f,
            "{} kills: {} ({:.1} %) with requests in flight ({} requests, {} answered by the next server); {} ({:.1} %) \
             inside a commit ({} with a slot written and not in the map, {} with the map in one place of two), {} more \
             with the map written and its request not answered; {} with I/O in the kernel ({} operations, finished \
             after the kill); {} before all was read back; beside these {} while opening, {} of them with the map to \
             repair; {} guests, {} requests answered, {} sectors lost to bad media",
            self.kills,
            self.in_flight,
            percent(self.in_flight),
            self.requests_in_flight,
            self.resubmitted,
            self.in_commit,
            percent(self.in_commit),
            self.before_map,
            self.half_map,
            self.before_answer,
            self.in_kernel,
            self.operations_in_kernel,
            self.early,
            self.opening,
            self.repairing,
            self.guests,
            self.answered,
            self.lost,
        )
    }
}
