//! The predecessor's `/proc` text, line for line, with true values.

use std::fmt::Write;

use crate::runtime::report::{Counters, StatusReport};

/// What `status --proc` prints. *Total errors* are failed device operations, *total remaps* live remapped
/// blocks and *health scans* completed passes, each since the server started.
pub fn render(volumes: &[StatusReport]) -> String {
    let total = |of: fn(&Counters) -> u64| volumes.iter().map(|v| of(&v.counters)).fold(0, u64::saturating_add);
    let remapped = volumes.iter().map(|v| v.blocks.remapped).fold(0, u64::saturating_add);
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| writeln!(out, "{text}").expect("writing to a String cannot fail");
    line(format_args!("vhost-remap {}", env!("CARGO_PKG_VERSION")));
    line(format_args!("{:=<34}", ""));
    line(format_args!(""));
    line(format_args!("Global Statistics:"));
    line(format_args!("  Active devices: {}", volumes.len()));
    line(format_args!("  Total reads:    {}", total(|c| c.reads)));
    line(format_args!("  Total writes:   {}", total(|c| c.writes)));
    line(format_args!("  Total remaps:   {remapped}"));
    line(format_args!("  Total errors:   {}", total(|c| c.device_errors)));
    line(format_args!("  Health scans:   {}", total(|c| c.health_scans)));
    line(format_args!(""));
    line(format_args!("Device Details:"));
    for volume in volumes {
        let path = |role: &str| volume.devices.iter().find(|d| d.role == role).map_or("-", |d| d.path.as_str());
        line(format_args!("  Device: {} -> {}", path("primary"), path("spare")));
        line(format_args!("    Reads:  {}", volume.counters.reads));
        line(format_args!("    Writes: {}", volume.counters.writes));
        line(format_args!("    Remaps: {}", volume.counters.remaps));
        line(format_args!("    Active mappings: {}", volume.blocks.remapped));
        line(format_args!("    Health scans: {}", volume.counters.health_scans));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::volume::scripted::sample_status;

    #[test]
    fn the_text_has_the_predecessors_shape() {
        let mut status = sample_status();
        status.counters.reads = 11;
        status.counters.writes = 22;
        status.counters.remaps = 33;
        status.counters.device_errors = 44;
        status.counters.health_scans = 55;
        status.blocks.remapped = 12;
        let version = env!("CARGO_PKG_VERSION");
        let expected = format!(
            "vhost-remap {version}
==================================

Global Statistics:
  Active devices: 1
  Total reads:    11
  Total writes:   22
  Total remaps:   12
  Total errors:   44
  Health scans:   55

Device Details:
  Device: /srv/disk.img -> /srv/disk.img.spare
    Reads:  11
    Writes: 22
    Remaps: 33
    Active mappings: 12
    Health scans: 55
"
        );
        assert_eq!(render(&[status]), expected);
    }
}
