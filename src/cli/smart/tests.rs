//! Answers in the shape that smartctl 7.3 gives for real drives, shortened.

use super::*;

const ATA: &str = include_str!("ata.json");
const NVME: &str = include_str!("nvme.json");

fn of(status: i32, text: &str) -> DriveView {
    view_of(&Ok((Some(status), text.as_bytes().to_vec())))
}

#[test]
fn a_disk_tells_its_attributes_and_those_that_matter_are_marked() {
    let view = DriveView { device: "/dev/sdb".into(), under: vec!["primary /dev/sdb1".into()], ..of(0, ATA) };
    let expected = "\
/dev/sdb (under primary /dev/sdb1): passed, WDC WD20EFRX-68EUZN0, 47657 h in use, 34 °C
    5 Reallocated_Sector_Ct: 0
  ! 197 Current_Pending_Sector: 3
    198 Offline_Uncorrectable: 0
";
    assert_eq!(text(&view), expected);
    // Below its threshold an attribute is shown whatever it is.
    let failing = ATA.replacen("\"when_failed\": \"\"", "\"when_failed\": \"now\"", 1);
    let value = DriveValue { name: "1 Raw_Read_Error_Rate".into(), value: "114".into(), notable: true };
    assert_eq!(of(16, &failing).values[0], value);
}

#[test]
fn an_nvme_drive_tells_its_wear() {
    let view = DriveView { device: "/dev/nvme0n1".into(), ..of(0, NVME) };
    let expected = "\
/dev/nvme0n1: passed, SAMSUNG MZVL21T0HCLR-00B00, 10423 h in use, 29 °C
    critical warning: 0
    available spare: 100 % (threshold 10 %)
    percentage used: 16 %
    media errors: 0
";
    assert_eq!(text(&view), expected);
    let worn = NVME.replace("\"passed\": true", "\"passed\": false").replace("spare\": 100", "spare\": 10");
    let view = of(8, &worn);
    assert_eq!(view.passed, Some(false));
    assert!(view.values[1].notable, "{view:?}");
    assert!(text(&view).contains("FAILED"), "{}", text(&view));
}

#[test]
fn a_drive_that_cannot_be_asked_costs_one_line() {
    let failed = r#"{"smartctl": {"messages": [{"string": "Smartctl open device: /dev/x failed: No such device",
        "severity": "error"}], "exit_status": 2}}"#;
    let lines = [
        (of(2, failed), "smartctl got no answer: Smartctl open device: /dev/x failed: No such device"),
        (of(1, "{}"), "smartctl got no answer: no reason given"),
        (of(0, "smartctl 6.6"), "smartctl gave no JSON; version 7.0 or later is needed"),
        (view_of(&run("/no/such/smartctl".as_ref(), Path::new("/dev/x"))), "smartctl is not installed"),
    ];
    for (view, part) in lines {
        let text = text(&DriveView { device: "/dev/x".into(), ..view });
        assert!(text.starts_with("/dev/x: no view: ") && text.contains(part) && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn devices_on_no_drive_are_named_once_each() {
    let device = |role: &str, path: &str| DeviceHealth { role: role.into(), path: path.into(), state: "OK".into() };
    let found = views(&[device("primary", "/proc/self/stat"), device("spare", "/no/such/file")], &[]);
    assert_eq!(found.len(), 2);
    assert!(found[0].unavailable.as_ref().unwrap().contains("--smart-device"), "{found:?}");
    assert!(found[1].unavailable.as_ref().unwrap().contains("/no/such/file"), "{found:?}");
    assert_eq!(found[0].under, ["primary /proc/self/stat"]);
}
