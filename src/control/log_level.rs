//! The predecessor's debug levels 0 to 3, as levels of the `log` crate.

use log::LevelFilter;

/// The highest debug level.
pub const MAX: u8 = 3;

/// 0 warn, 1 info, 2 debug, 3 trace.
pub fn filter(level: u8) -> Option<LevelFilter> {
    match level {
        0 => Some(LevelFilter::Warn),
        1 => Some(LevelFilter::Info),
        2 => Some(LevelFilter::Debug),
        MAX => Some(LevelFilter::Trace),
        _ => None,
    }
}
