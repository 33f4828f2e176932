//! What a server said at one moment.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::runtime::health::HealthReport;
use crate::runtime::report::{EventRecord, StatusReport};
use crate::runtime::stats::StatsReport;
use crate::runtime::surface::SurfaceReport;

/// All that is shown of a volume.
#[derive(Clone, Debug)]
pub(super) struct Shot {
    /// Volumes the server has.
    pub(super) names: Vec<String>,
    /// The one this is about.
    pub(super) name: String,
    pub(super) status: StatusReport,
    /// Absent where the server has no scanner.
    pub(super) scan: Option<Scan>,
    pub(super) stats: StatsReport,
    /// Absent while the volume is not open.
    pub(super) health: Option<HealthReport>,
    /// Absent then, and where it was asked for not long ago.
    pub(super) surface: Option<SurfaceReport>,
    /// Since the last time, oldest first.
    pub(super) events: Vec<EventRecord>,
    /// Whether those are all there are: the numbers began anew, or another volume was chosen.
    pub(super) events_anew: bool,
}

/// How the scanner stands. Servers of other versions say more or less of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Scan {
    pub(super) state: String,
    pub(super) pass: u64,
    pub(super) percent: f64,
    pub(super) speed_now: u64,
    pub(super) speed_average: u64,
    pub(super) eta_seconds: Option<u64>,
    pub(super) found: BTreeMap<String, u64>,
}

/// A status, and what it says of the scanner.
pub(super) struct Status {
    pub(super) report: StatusReport,
    pub(super) scan: Option<Scan>,
}

impl<'de> Deserialize<'de> for Status {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Status, D::Error> {
        let document = Value::deserialize(deserializer)?;
        let scan = document.get("scan").filter(|scan| !scan.is_null()).and_then(|scan| Scan::deserialize(scan).ok());
        let report = serde_json::from_value(document).map_err(D::Error::custom)?;
        Ok(Status { report, scan })
    }
}

impl Scan {
    /// What was found, most important first, without what was not.
    pub(super) fn finds(&self) -> String {
        const ORDER: [&str; 8] = ["lost", "bad", "slow", "recovered", "metadata", "moved", "rewritten", "healed"];
        let known = ORDER.iter().filter_map(|name| self.found.get_key_value(*name));
        let others = self.found.iter().filter(|(name, _)| !ORDER.contains(&name.as_str()));
        let finds = known.chain(others).filter(|(_, count)| **count > 0);
        finds.map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
    }
}
