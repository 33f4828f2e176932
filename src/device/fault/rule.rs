//! What a fault rule says, and how it is written down.

use serde::{Deserialize, Deserializer, Serialize};

use crate::device::{DeviceIndex, Errno, OpKind};
use crate::units::{Sector, SectorRange};

/// Longest delay: longer ones would only look like a hang.
pub const DELAY_MS_MAX: u64 = 3_600_000;

/// A kind of operation that a rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultOp {
    /// Reads.
    Read,
    /// Writes, of zeros too.
    Write,
    /// Flushes; they have no sectors, so the range of the rule does not matter.
    Flush,
    /// Discards.
    Discard,
    /// The question whether the device is still there; no range either.
    Identify,
}

impl FaultOp {
    /// The kind `kind` belongs to.
    pub fn of(kind: OpKind) -> FaultOp {
        match kind {
            OpKind::Read => FaultOp::Read,
            OpKind::Write | OpKind::WriteZeroes { .. } => FaultOp::Write,
            OpKind::Flush => FaultOp::Flush,
            OpKind::Discard => FaultOp::Discard,
            OpKind::Identify => FaultOp::Identify,
        }
    }

    /// Whether such operations have sectors.
    pub fn has_range(self) -> bool {
        matches!(self, FaultOp::Read | FaultOp::Write | FaultOp::Discard)
    }
}

/// What goes wrong where. In JSON:
/// `{"device": "primary", "ops": ["read"], "sectors": "2048-2055", "errno": "EIO"}`; the other fields
/// have the defaults of [`FaultRule::new`], except that a rule with a delay and without an errno
/// only delays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RuleText", into = "RuleText")]
pub struct FaultRule {
    /// Given by [`super::FaultTable::add`].
    pub id: u64,
    /// Which device.
    pub device: DeviceIndex,
    /// Which operations.
    pub ops: Vec<FaultOp>,
    /// Which sectors; `None` for all.
    pub range: Option<SectorRange>,
    /// How they fail; `None` if the rule only delays.
    pub errno: Option<Errno>,
    /// How many more times, before the rule is gone; `None` for ever.
    pub count: Option<u64>,
    /// A sector that is successfully written fails no more, like a disk's pending sector. A rule whose
    /// whole range was written is gone.
    pub until_rewritten: bool,
    /// Milliseconds before the operation goes to the device, or fails.
    pub delay_ms: u64,
    /// How likely an operation is hit, 0 to 1.
    pub probability: f64,
    /// Starts the rule's own dice: the same operations meet the same fate.
    pub seed: u64,
    /// A failing write still writes the sectors outside of `range`, as real disks do. Where these are
    /// not whole logical blocks, they are not written.
    pub partial: bool,
}

impl FaultRule {
    /// A rule that fails these operations on the whole device with EIO, always and at once.
    pub fn new(device: DeviceIndex, ops: &[FaultOp]) -> FaultRule {
        FaultRule {
            id: 0,
            device,
            ops: ops.to_vec(),
            range: None,
            errno: Some(Errno(libc::EIO)),
            count: None,
            until_rewritten: false,
            delay_ms: 0,
            probability: 1.0,
            seed: 0,
            partial: false,
        }
    }
}

/// Why a rule is refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RuleError {
    /// No kind of operation.
    #[error("\"ops\" is empty: name at least one of read, write, flush, discard, identify")]
    NoOps,
    /// Not a device.
    #[error("\"{0}\" is not a device: use primary or spare")]
    Device(String),
    /// Not sectors.
    #[error("\"{0}\" is not a range of sectors: use a-b with a <= b, such as 2048-2055, or one number")]
    Sectors(String),
    /// Not a probability.
    #[error("probability {0} is not between 0 and 1")]
    Probability(f64),
    /// Never.
    #[error("count 0 would never fail anything: leave it out for a rule without an end")]
    Count,
    /// Too long.
    #[error("a delay of {0} ms is longer than an hour")]
    Delay(u64),
    /// Nothing to do.
    #[error("the rule does nothing: give an errno or a delay_ms")]
    Nothing,
}

/// A rule as JSON has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleText {
    #[serde(default)]
    id: u64,
    device: String,
    ops: Vec<FaultOp>,
    #[serde(default)]
    sectors: Option<String>,
    /// Absent, null and a name are three things.
    #[serde(default, deserialize_with = "present")]
    errno: Option<Option<Errno>>,
    #[serde(default)]
    count: Option<u64>,
    #[serde(default)]
    until_rewritten: bool,
    #[serde(default)]
    delay_ms: u64,
    #[serde(default = "certain")]
    probability: f64,
    #[serde(default)]
    seed: u64,
    #[serde(default)]
    partial: bool,
}

fn certain() -> f64 {
    1.0
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<Errno>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

impl TryFrom<RuleText> for FaultRule {
    type Error = RuleError;

    fn try_from(text: RuleText) -> Result<FaultRule, RuleError> {
        let device = match text.device.as_str() {
            "primary" => DeviceIndex::PRIMARY,
            "spare" => DeviceIndex::SPARE,
            _ => return Err(RuleError::Device(text.device)),
        };
        let range =
            text.sectors.map(|sectors| parse_sectors(&sectors).ok_or(RuleError::Sectors(sectors))).transpose()?;
        let errno = text.errno.unwrap_or((text.delay_ms == 0).then_some(Errno(libc::EIO)));
        let RuleText { id, ops, count, until_rewritten, delay_ms, probability, seed, partial, .. } = text;
        if ops.is_empty() {
            return Err(RuleError::NoOps);
        }
        if !(0.0..=1.0).contains(&probability) {
            return Err(RuleError::Probability(probability));
        }
        if count == Some(0) {
            return Err(RuleError::Count);
        }
        if delay_ms > DELAY_MS_MAX {
            return Err(RuleError::Delay(delay_ms));
        }
        if errno.is_none() && delay_ms == 0 {
            return Err(RuleError::Nothing);
        }
        let rule =
            FaultRule { id, device, ops, range, errno, count, until_rewritten, delay_ms, probability, seed, partial };
        Ok(rule)
    }
}

impl From<FaultRule> for RuleText {
    fn from(rule: FaultRule) -> RuleText {
        let sectors = rule.range.map(|range| format!("{}-{}", range.start, range.end().0.saturating_sub(1)));
        RuleText {
            id: rule.id,
            device: rule.device.to_string(),
            ops: rule.ops,
            sectors,
            errno: Some(rule.errno),
            count: rule.count,
            until_rewritten: rule.until_rewritten,
            delay_ms: rule.delay_ms,
            probability: rule.probability,
            seed: rule.seed,
            partial: rule.partial,
        }
    }
}

/// `a-b` with both ends included, or one number.
fn parse_sectors(text: &str) -> Option<SectorRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
    let count = last.checked_sub(first)?.checked_add(1)?;
    first.checked_add(count)?;
    Some(SectorRange { start: Sector(first), count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_rule_gets_its_defaults_and_goes_both_ways() {
        let text = r#"{"device": "primary", "ops": ["read", "write"], "sectors": "100-107"}"#;
        let rule: FaultRule = serde_json::from_str(text).unwrap();
        let range = SectorRange { start: Sector(100), count: 8 };
        let expected = FaultRule::new(DeviceIndex::PRIMARY, &[FaultOp::Read, FaultOp::Write]);
        assert_eq!(rule, FaultRule { range: Some(range), ..expected });
        let again: FaultRule = serde_json::from_str(&serde_json::to_string(&rule).unwrap()).unwrap();
        assert_eq!(again, rule);
    }

    #[test]
    fn a_delay_alone_does_not_fail_and_survives_the_round_trip() {
        let rule: FaultRule = serde_json::from_str(r#"{"device":"spare","ops":["flush"],"delay_ms":5}"#).unwrap();
        assert_eq!((rule.errno, rule.delay_ms), (None, 5));
        let again: FaultRule = serde_json::from_str(&serde_json::to_string(&rule).unwrap()).unwrap();
        assert_eq!(again, rule);
        let both = r#"{"device":"spare","ops":["flush"],"delay_ms":5,"errno":"ETIMEDOUT"}"#;
        assert_eq!(serde_json::from_str::<FaultRule>(both).unwrap().errno, Some(Errno(libc::ETIMEDOUT)));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let check = |fields: &str, expected: &str| {
            let text = format!(r#"{{"device":"primary",{fields}}}"#);
            let message = serde_json::from_str::<FaultRule>(&text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        check(r#""ops":[]"#, "\"ops\" is empty");
        check(r#""ops":["trim"]"#, "unknown variant `trim`");
        check(r#""ops":["read"],"sectors":"9-3""#, "\"9-3\" is not a range of sectors");
        check(r#""ops":["read"],"sectors":"0-18446744073709551615""#, "is not a range of sectors");
        check(r#""ops":["read"],"errno":"EWHAT""#, "\"EWHAT\" is not an error: use a name such as EIO");
        check(r#""ops":["read"],"probability":1.5"#, "probability 1.5 is not between 0 and 1");
        check(r#""ops":["read"],"count":0"#, "count 0");
        check(r#""ops":["read"],"errno":null"#, "the rule does nothing");
        check(r#""ops":["read"],"sector":"1""#, "unknown field `sector`");
        let message = serde_json::from_str::<FaultRule>(r#"{"device":"disk","ops":["read"]}"#).unwrap_err();
        assert!(message.to_string().contains("\"disk\" is not a device: use primary or spare"));
    }
}
