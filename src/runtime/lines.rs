//! How many lines are logged: a guest and a front-end can cause as many as they like.

use crate::units::Time;

/// Lines of events logged in [`LINES_SECONDS`], at most: a guest can cause as many as it likes.
pub const EVENT_LINES_MAX: u64 = 500;
/// Other lines, at most: those that a front-end can cause are of messages, each of which costs it a connection.
pub const OTHER_LINES_MAX: u64 = 5000;
/// A stretch of time, in seconds.
pub const LINES_SECONDS: u64 = 10;

/// How much was logged lately.
#[derive(Debug, Default)]
pub struct Lines {
    /// Number of the stretch of time, from the clock's start.
    stretch: u64,
    lines: u64,
}

impl Lines {
    /// Count a line at `time`, of which there are to be `most`: whether to log it, and how many were left out before.
    pub fn count(&mut self, time: Time, most: u64) -> (bool, u64) {
        let stretch = time.0 / (LINES_SECONDS * 1_000_000_000);
        let mut left_out = 0;
        if stretch > self.stretch {
            left_out = self.lines.saturating_sub(most);
            *self = Lines { stretch, lines: 0 };
        }
        self.lines += 1;
        (self.lines <= most, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_events_is_logged_in_part_and_says_so() {
        const MOST: u64 = EVENT_LINES_MAX;
        let mut lines = Lines::default();
        let second = |n: u64| Time(n * 1_000_000_000);
        let logged = (0..MOST + 70).filter(|_| lines.count(second(3), MOST).0).count() as u64;
        assert_eq!(logged, MOST);
        assert_eq!(lines.count(second(9), MOST), (false, 0));
        assert_eq!(lines.count(second(10), MOST), (true, 71));
        assert_eq!(lines.count(second(20), MOST), (true, 0));
    }
}
