//! What is said of the scanner.

use super::bytes_of;
use super::pass::{Pass, Stage};
use crate::device::DeviceIndex;
use crate::engine::healer::Core;
use crate::engine::scan::{ScanState, ScanStatus, Scanned, Skipped};
use crate::units::{SECTOR_SIZE, Sector, SectorRange};

impl Core {
    /// Bytes that the pass is to go over: each block where it lives, and all pages of metadata.
    pub(super) fn scan_total(&self) -> u64 {
        let pass = self.scan.pass.borrow();
        let (extent, all) =
            pass.as_ref().map_or((self.whole(), true), |pass| (pass.extent, pass.scope.range.is_none()));
        bytes_of(extent) + if all { self.metadata_bytes() } else { 0 }
    }

    /// How the scanner stands.
    pub(in crate::engine::healer) fn scan_status(&self) -> ScanStatus {
        let now = self.io.now();
        let (total, next) = (self.scan_total(), self.next_scan());
        let record = self.scan.record.borrow();
        let last = Some(record.last).filter(|last| last.pass > 0);
        let last_complete = Some(record.complete_ended).filter(|ended| *ended > 0);
        let pass = self.scan.pass.borrow();
        let Some(pass) = pass.as_ref() else {
            let state = if next.is_some() { ScanState::Waiting } else { ScanState::Off };
            let over = self.scan.over.borrow().clone();
            let found = record.last.found;
            let (held, speed_now, eta_seconds) = (None, 0, None);
            let pass = record.pass;
            let (releasable, slow, scanned) = (self.releasable(), self.scan.slow.borrow().clone(), self.scanned(None));
            let over = ScanStatus { releasable, slow, scanned, ..over };
            return ScanStatus { state, held, pass, found, speed_now, eta_seconds, last, last_complete, next, ..over };
        };
        let (state, held) = match &pass.waits {
            _ if pass.paused => (ScanState::Paused, None),
            Some((state, why)) => (*state, Some(why.clone())),
            None => (ScanState::Running, None),
        };
        let covered = pass.covered.min(total);
        let (speed_now, speed_average) =
            if state == ScanState::Running { pass.speeds(now) } else { (0, pass.speeds(now).1) };
        ScanStatus {
            state,
            held,
            pass: pass.number,
            scope: pass.scope,
            started: pass.started,
            covered,
            total,
            read: pass.read,
            speed_now,
            speed_average,
            eta_seconds: (total - covered).checked_div(speed_average).filter(|_| state == ScanState::Running),
            found: pass.found,
            skipped: pass.skipped.clone(),
            skipped_bytes: pass.skipped_bytes,
            releasable: self.releasable(),
            last,
            last_complete,
            next,
            slow: self.scan.slow.borrow().clone(),
            scanned: self.scanned(Some(pass)),
        }
    }

    /// Blocks in slots that may be released, as far as a read tells.
    fn releasable(&self) -> u64 {
        let map = self.map.borrow();
        let blocks = self.scan.releasable.borrow();
        blocks.iter().filter(|block| map.get(**block).slot.is_some()).count() as u64
    }

    /// What was read of the primary by the pass that is under way, or by any that was complete but for what the latest
    /// one left out.
    fn scanned(&self, pass: Option<&Pass>) -> Scanned {
        let record = self.scan.record.borrow();
        let (whole, complete) = (self.whole(), record.complete_capacity.min(self.geometry().capacity));
        let extent = SectorRange { count: complete, ..whole };
        let of_primary = |skipped: &[Skipped]| {
            let sectors = |part: &Skipped| SectorRange {
                start: Sector(part.offset / SECTOR_SIZE),
                count: part.len.div_ceil(SECTOR_SIZE),
            };
            skipped.iter().filter(|part| part.device == DeviceIndex::PRIMARY).map(sectors).collect()
        };
        if complete == whole.count {
            // What the latest one had to leave out may have changed since.
            let skipped =
                pass.map_or_else(|| of_primary(&self.scan.over.borrow().skipped), |pass| of_primary(&pass.skipped));
            return Scanned { extent, position: u64::MAX, skipped };
        }
        let of_complete = Scanned { extent, position: u64::MAX, skipped: Vec::new() };
        let of_pass = |pass: &Pass| {
            let listed: u64 = pass.skipped.iter().map(|part| part.len).sum();
            let position = match pass.cursor.stage {
                // The list has no room for more, or is of before a restart: it might be anywhere.
                _ if listed < pass.skipped_bytes => 0,
                Stage::Primary => pass.cursor.position,
                _ => u64::MAX,
            };
            Scanned { extent: pass.extent, position, skipped: of_primary(&pass.skipped) }
        };
        match pass {
            Some(pass) => of_pass(pass),
            // It has grown since.
            None if complete > 0 => of_complete,
            None => self.scan.over.borrow().scanned.clone(),
        }
    }
}
