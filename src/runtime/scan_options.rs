//! What an operator chooses of the scanner.

use std::str::FromStr;
use std::time::Duration;

pub use crate::engine::scan::Window;

/// Seconds of an hour.
const HOUR: u64 = 3600;
/// Passes are no closer to each other than that.
const INTERVAL_MIN: Duration = Duration::from_secs(HOUR);
/// Passes are no farther from each other than that.
const INTERVAL_MAX: Duration = Duration::from_secs(90 * 24 * HOUR);
/// Where nobody says anything else.
const INTERVAL_DEFAULT: Duration = Duration::from_secs(14 * 24 * HOUR);

/// How often passes begin by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanInterval {
    /// Never: only by order.
    Off,
    /// From the start of one to the start of the next.
    Every(Duration),
}

impl ScanInterval {
    /// The time, where there is one.
    pub fn time(self) -> Option<Duration> {
        match self {
            ScanInterval::Off => None,
            ScanInterval::Every(time) => Some(time),
        }
    }
}

impl Default for ScanInterval {
    fn default() -> Self {
        ScanInterval::Every(INTERVAL_DEFAULT)
    }
}

impl FromStr for ScanInterval {
    type Err = String;

    /// `off`, or a time: `14d`, `36h`, `1day 12h`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(ScanInterval::Off);
        }
        let time = humantime::parse_duration(text)
            .map_err(|_| format!("{text:?} is no time such as 14d, 36h or '1day 12h', nor off"))?;
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&time) {
            return Err(format!("{text:?} is not between 1h and 90d; `off` leaves passes to orders"));
        }
        Ok(ScanInterval::Every(time))
    }
}

/// Whether blocks that can hardly be read move to slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MoveWeak {
    /// Where the primary is a block device: how long a file's blocks take says little of them.
    #[default]
    Auto,
    /// They do.
    On,
    /// They are only counted.
    Off,
}

impl MoveWeak {
    /// Whether they do, with such a primary.
    pub fn applies(self, primary_is_file: bool) -> bool {
        match self {
            MoveWeak::Auto => !primary_is_file,
            MoveWeak::On => true,
            MoveWeak::Off => false,
        }
    }
}

impl FromStr for MoveWeak {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(MoveWeak::Auto),
            "on" => Ok(MoveWeak::On),
            "off" => Ok(MoveWeak::Off),
            _ => Err(format!("{text:?} is none of auto, on, off")),
        }
    }
}

/// All of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanOptions {
    /// How often.
    pub interval: ScanInterval,
    /// Bytes of a second read at most.
    pub rate: Option<u64>,
    /// When passes that were not ordered go on.
    pub window: Window,
    /// Weak blocks.
    pub move_weak: MoveWeak,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_an_hour_to_90_days_or_off() {
        let check = |text: &str, seconds| {
            assert_eq!(text.parse(), Ok(ScanInterval::Every(Duration::from_secs(seconds))), "{text}");
        };
        check("14d", 14 * 86_400);
        check("1h", 3600);
        check("90days", 90 * 86_400);
        check("1day 12h", 36 * 3600);
        assert_eq!("off".parse(), Ok(ScanInterval::Off));
        assert_eq!((ScanInterval::Off.time(), ScanInterval::default().time()), (None, Some(INTERVAL_DEFAULT)));
        for (text, why) in [("59m", "between 1h and 90d"), ("91d", "between 1h and 90d"), ("14", "no time"), ("", "no")]
        {
            let error = text.parse::<ScanInterval>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn weak_blocks_of_a_file_stay_unless_told_otherwise() {
        let applies = |text: &str| [true, false].map(|file| text.parse::<MoveWeak>().unwrap().applies(file));
        assert_eq!((applies("auto"), applies("on"), applies("off")), ([false, true], [true; 2], [false; 2]));
        assert!("maybe".parse::<MoveWeak>().is_err());
    }
}
