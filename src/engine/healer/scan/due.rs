//! When passes begin, and how long they may take.

use std::rc::Rc;

use crate::engine::healer::Core;
use crate::engine::scan::ScanScope;

/// The first pass that is due begins so many seconds after the volume was opened.
const SETTLE_SECONDS: u64 = 600;
/// A late pass has at least one so many-th of the interval for what is left.
const LATE_SHARE: u64 = 2;

impl Core {
    pub(super) async fn scan_when_due(self: &Rc<Self>) {
        while let Some(due) = self.next_scan() {
            let now = self.wall_seconds();
            if due > now {
                self.io.sleep_until(self.io.now().plus_secs(due - now)).await;
            } else if self.scan.pass.borrow().is_some() {
                self.io.sleep_until(self.io.now().plus_secs(SETTLE_SECONDS)).await;
            } else {
                self.begin_pass(ScanScope::default(), false);
            }
            if self.closing.get() {
                return;
            }
        }
    }

    /// When a pass is due, seconds since the epoch.
    pub(super) fn next_scan(&self) -> Option<u64> {
        let record = self.scan.record.borrow();
        let settled = self.scan.opened.get() + SETTLE_SECONDS;
        let interval = self.scan.params.interval?;
        Some(if record.whole_ended == 0 { settled } else { settled.max(record.whole_ended.saturating_add(interval)) })
    }

    /// Seconds in which the pass may read until it has taken as long as the next one waits. A late one does not catch
    /// up all at once.
    pub(super) fn seconds_left(&self) -> Option<u64> {
        let (interval, now) = (self.scan.params.interval?, self.wall_seconds());
        let pass = self.scan.pass.borrow();
        let pass = pass.as_ref()?;
        let left = pass.started.saturating_add(interval).saturating_sub(now);
        let left = left.clamp(interval / LATE_SHARE, interval);
        Some(if pass.ordered { left } else { self.scan.params.window.open_of(left) })
    }
}
