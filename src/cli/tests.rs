//! Commands typed at a server with scripted volumes.

use std::ffi::OsString;

use clap::{CommandFactory, Parser};

use super::run::{CliError, run, serve_options};
use super::{Args, with_subcommand};
use crate::control::tests::Running;
use crate::control::volume::scripted::{ScriptedVolume, entry, event};
use crate::control::volume::{Order, ScanOrder, ScanScope};
use crate::device::fault::FaultTable;
use crate::runtime::options::{
    Cache, CreateIfAbsent, FailOrHold, IoEngine, Listen, ServeOptions, Transport, VolumeShape,
};
use crate::runtime::scan_options::{MoveWeak, ScanInterval, ScanOptions};
use crate::runtime::scan_report::{LastPass, ScanReport};
use crate::units::{Sector, SectorRange};

/// Run `words` with the server's control path in place of `CTL`; the output.
fn typed(running: &Running, words: &str) -> Result<String, CliError> {
    let path = running.path().display().to_string();
    let words = words.split(' ').map(|word| if word == "CTL" { path.as_str() } else { word });
    let args = Args::parse_from(std::iter::once("vhost-remap").chain(words));
    let mut out = Vec::new();
    run(args, &mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

#[test]
fn status_prints_text_json_or_the_predecessors_text() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    assert!(typed(&running, "status --control-path CTL").unwrap().starts_with("Volume "));
    let json = typed(&running, "status --control-path CTL --json").unwrap();
    assert_eq!(json.lines().count(), 1);
    assert_eq!(serde_json::from_str::<crate::runtime::report::StatusReport>(&json).unwrap(), volume.status);
    assert!(typed(&running, "status --control-path CTL --proc").unwrap().contains("\nGlobal Statistics:\n"));
}

#[test]
fn list_prints_all_pages_and_one_head() {
    let mut volume = ScriptedVolume::new();
    volume.entries = (0..10_000).map(|i| entry(8 * i, "remapped", &[])).collect();
    volume.entries[9_000].lost = vec![72_003];
    let (running, _) = Running::one(volume);
    assert_eq!(typed(&running, "list --control-path CTL").unwrap().lines().count(), 10_001);
    assert_eq!(typed(&running, "list --control-path CTL --json").unwrap().lines().count(), 10_000);
    let lost = typed(&running, "list --control-path CTL --lost").unwrap();
    assert_eq!(lost.lines().count(), 2);
    assert!(lost.ends_with("  72003\n"), "{lost}");
    assert_eq!(typed(&running, "list --control-path CTL --pending").unwrap(), "none\n");
}

#[test]
fn events_prints_what_there_is_and_ends() {
    let mut volume = ScriptedVolume::new();
    volume.events = (1..=5_000).map(event).collect::<Vec<_>>().into();
    let (running, _) = Running::one(volume);
    assert_eq!(typed(&running, "events --control-path CTL").unwrap().lines().count(), 5_000);
    let json = typed(&running, "events --control-path CTL --json").unwrap();
    assert!(json.lines().last().unwrap().contains("\"seq\":5000"), "{json}");
}

#[test]
fn orders_print_the_volumes_answer() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    assert_eq!(typed(&running, "remap --control-path CTL 8-15 17").unwrap(), "done as told\ndone as told\n");
    assert_eq!(typed(&running, "save --control-path CTL --json").unwrap(), "{\"message\":\"done as told\"}\n");
    assert_eq!(typed(&running, "resize --control-path CTL --size 2G").unwrap(), "done as told\n");
    assert_eq!(typed(&running, "resize --control-path CTL").unwrap(), "done as told\n");
    let range = |start, count| SectorRange { start: Sector(start), count };
    let sizes = [Order::Resize(Some(2 << 30)), Order::Resize(None)];
    let expected = [&[Order::Remap(range(8, 8)), Order::Remap(range(17, 1)), Order::Save][..], &sizes].concat();
    assert_eq!(*volume.orders.lock().unwrap(), expected);
    let pong = format!("pong from vhost-remap {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(typed(&running, "ping --control-path CTL").unwrap(), pong);
}

#[test]
fn verify_prints_the_slot_or_that_there_is_none() {
    let mut volume = ScriptedVolume::new();
    volume.entries = (0..10_000).map(|i| entry(16 * i, "remapped", &[])).collect();
    volume.entries[3] = entry(48, "pending", &[]);
    let (running, volume) = Running::one(volume);
    let verify = |words: &str| typed(&running, &format!("verify --control-path CTL {words}"));
    assert_eq!(verify("17").unwrap(), "sector 17 -> slot 7\n");
    assert_eq!(verify("15 48").unwrap(), "sector 15 is not remapped\nsector 48 is not remapped\n");
    let expected = "sectors 20-23 -> slot 7\nsectors 24-31 are not remapped\nsector 32 -> slot 7\n";
    assert_eq!(verify("20-32").unwrap(), expected);
    assert_eq!(verify("0-159999").unwrap().lines().count(), 19_998);
    let json = verify("17 24 --json").unwrap();
    assert_eq!(json, "{\"sector\":17,\"sectors\":1,\"slot\":7}\n{\"sector\":24,\"sectors\":1,\"slot\":null}\n");
    let capacity = volume.status.capacity_sectors;
    let error = verify(&format!("{}-{capacity}", capacity - 1)).unwrap_err();
    let expected = format!(
        "/srv/disk.img: 2 sectors from {} are not all on the disk; its last sector is {}",
        capacity - 1,
        capacity - 1
    );
    assert_eq!((error.to_string(), error.exit_status()), (expected, 1));
}

#[test]
fn a_refused_order_fails_with_the_reason() {
    let mut volume = ScriptedVolume::new();
    volume.refuse = Some("primary /srv/disk.img: nothing to clear");
    let (running, _) = Running::one(volume);
    let error = typed(&running, "clear --control-path CTL").unwrap_err();
    assert_eq!(error.to_string(), "primary /srv/disk.img: nothing to clear");
    assert_eq!(error.exit_status(), 1);
}

#[test]
fn a_named_volume_is_asked_for() {
    let (running, volumes) = Running::new(vec![ScriptedVolume::new(), ScriptedVolume::new()]);
    typed(&running, "save --control-path CTL --volume disk1").unwrap();
    assert!(volumes[0].orders.lock().unwrap().is_empty());
    assert_eq!(*volumes[1].orders.lock().unwrap(), [Order::Save]);
    let error = typed(&running, "save --control-path CTL --volume a&b=c").unwrap_err().to_string();
    assert!(error.contains("no volume \"a&b=c\""), "{error}");
}

#[test]
fn faults_are_added_listed_and_cleared() {
    let mut volume = ScriptedVolume::new();
    volume.faults = Some(std::sync::Arc::new(FaultTable::new()));
    let (running, _) = Running::one(volume);
    let fault = |words: &str| typed(&running, &format!("fault {words} --control-path CTL"));
    assert_eq!(fault("list").unwrap(), "no fault rules\n");
    assert_eq!(fault("add --sectors 8-15 --sectors 64 --ops read --count 2").unwrap().lines().count(), 2);
    let json = fault("add --device spare --ops flush --delay 5 --json").unwrap();
    assert_eq!(json, "{\"id\":3}\n");
    fault("add --errno ETIMEDOUT --until-rewritten --partial --probability 0.5 --seed 7 --sectors 1").unwrap();
    let expected = "\
ID  DEVICE   OPS         SECTORS  ERROR      HITS  DETAILS
 1  primary  read        8-15     EIO           0  2 more times
 2  primary  read        64       EIO           0  2 more times
 3  spare    flush       all      none          0  delay 5 ms
 4  primary  read,write  1        ETIMEDOUT     0  until rewritten, probability 0.5 (seed 7), partial effect
";
    assert_eq!(fault("list").unwrap(), expected);
    assert_eq!(fault("clear 2").unwrap(), "fault rules removed: 1\n");
    assert!(fault("clear 2").unwrap_err().to_string().contains("no fault rule 2"));
    assert_eq!(fault("clear").unwrap(), "fault rules removed: 3\n");
    let error = fault("add --errno none").unwrap_err().to_string();
    assert!(error.contains("the rule does nothing"), "{error}");
}

#[test]
fn scan_s_verbs_reach_the_volume() {
    let mut scripted = ScriptedVolume::new();
    let last = LastPass { pass: 3, complete: true, ..LastPass::default() };
    (scripted.status.scan.state, scripted.status.scan.last) = ("waiting".into(), Some(last));
    let (running, volume) = Running::one(scripted);
    for words in ["start", "pause", "resume", "cancel"] {
        assert_eq!(typed(&running, &format!("scan {words} --control-path CTL")).unwrap(), "done as told\n");
    }
    let waited = typed(&running, "scrub start --control-path CTL --range 8-23 --check-only --wait").unwrap();
    assert!(waited.starts_with("done as told\npass 3 has ended after 0s: ") && waited.lines().count() == 2, "{waited}");
    let range = SectorRange { start: Sector(8), count: 16 };
    let expected = [
        ScanOrder::Start(ScanScope::default()),
        ScanOrder::Pause,
        ScanOrder::Resume,
        ScanOrder::Cancel,
        ScanOrder::Start(ScanScope { range: Some(range), check_only: true }),
    ];
    assert_eq!(*volume.orders.lock().unwrap(), expected.map(Order::Scan));
    let json = typed(&running, "scan wait --control-path CTL --json").unwrap();
    assert_eq!(serde_json::from_str::<ScanReport>(&json).unwrap(), volume.status.scan);
}

#[test]
fn waiting_for_a_pass_that_takes_too_long_or_loses_its_server_is_one_line() {
    let (running, _) = Running::one(ScriptedVolume::new());
    let why = typed(&running, "scan wait --control-path CTL --timeout 0").unwrap_err().to_string();
    assert_eq!(
        why,
        "not done within 0 s: pass 3: 25.0 %, 100 MiB/s now, 80 MiB/s on average, 1m 36s left, 2.5 GiB of 10 GiB; \
         only the waiting ends"
    );
}

fn serve_options_of(words: &str) -> ServeOptions {
    let args = Args::try_parse_from(words.split(' ')).unwrap();
    let super::args::Command::Serve(args) = args.command else { panic!("not serve") };
    serve_options(*args).unwrap()
}

#[test]
fn serve_has_defaults_for_all_but_the_disk_and_the_socket() {
    let options = serve_options_of("x serve --blk-file /no/disk --socket-path /run/s");
    let expected = ServeOptions {
        primary: "/no/disk".into(),
        spare: Some("/no/disk.spare".into()),
        listen: Listen::Path("/run/s".into()),
        control_path: Some("/run/s.ctl".into()),
        num_queues: 64,
        transport: Transport::Own,
        poll_us: None,
        workers: None,
        read_only: false,
        create: None,
        io_engine: IoEngine::Auto,
        cache: Cache::None,
        fault_injection: false,
        accept_external: false,
        passthrough: false,
        degraded: false,
        on_device_loss: FailOrHold::Fail,
        on_spare_full: FailOrHold::Fail,
        incoming: false,
        control_group: None,
        http_listen: None,
        scan: ScanOptions::default(),
        lock_wait: std::time::Duration::from_secs(30),
    };
    assert_eq!(options, expected);
}

#[test]
fn serve_takes_what_it_is_told() {
    let options = serve_options_of(
        "x serve --primary p --spare s --fd 3 --create --size 1G --serial d1 --io-engine threads --cache writeback \
         --on-device-loss hold --on-spare-full hold=9 --num-queues 2 --workers 1",
    );
    let shape = VolumeShape { max_remaps: 16_384, serial: Some("d1".into()) };
    assert_eq!(options.listen, Listen::Fd(3));
    assert_eq!(options.control_path, None);
    assert_eq!(options.spare, Some("s".into()));
    assert_eq!(options.create, Some(CreateIfAbsent { size: 1 << 30, shape }));
    assert_eq!((options.io_engine, options.cache), (IoEngine::Threads, Cache::Writeback));
    assert_eq!(options.on_device_loss, FailOrHold::Hold(None));
    assert_eq!(options.on_spare_full, FailOrHold::Hold(Some(std::time::Duration::from_secs(9))));
    assert_eq!((options.num_queues, options.workers), (2, Some(1)));
    assert_eq!(serve_options_of("x serve --primary p --fd 3 --passthrough").spare, None);
    let framework = serve_options_of("x serve --primary p --fd 3 --transport framework");
    assert_eq!(framework.transport, Transport::Framework);
}

#[test]
fn serve_takes_what_the_scanner_is_told() {
    let of = |words: &str| serve_options_of(&format!("x serve --primary p --fd 3 {words}"));
    let every = |hours: u64| ScanInterval::Every(std::time::Duration::from_secs(hours * 3600));
    assert_eq!(serve_options_of("x serve --primary p --fd 3").scan.interval, every(14 * 24));
    assert_eq!(of("--scan-interval off").scan.interval, ScanInterval::Off);
    assert_eq!(of("--scan-interval-hours 168").scan.interval, every(168));
    assert_eq!(of("--scan_interval_hours 24").scan.interval, every(24));
    let told = of("--scan-interval 36h --scan-rate 50M --scan-window 22:00-06:00 --move-weak on");
    let scan = ScanOptions {
        interval: every(36),
        rate: Some(50 << 20),
        window: "22:00-06:00".parse().unwrap(),
        move_weak: MoveWeak::On,
    };
    assert_eq!((told.scan, told.scan_interval()), (scan, every(36).time()));
    // Where no metadata is written, passes do not begin by themselves.
    assert_eq!((of("--passthrough").scan_interval(), of("--read-only").scan_interval()), (None, None));
    let mut command = Args::command();
    let help = command.find_subcommand_mut("serve").unwrap().render_long_help().to_string();
    assert!(help.contains("--scan-interval <TIME>") && !help.contains("scan-interval-hours"), "{help}");
}

fn argv(words: &str) -> Vec<OsString> {
    words.split(' ').map(OsString::from).collect()
}

#[test]
fn options_without_a_subcommand_mean_serve() {
    let check = |given, expected| assert_eq!(with_subcommand(argv(given)), argv(expected));
    check("x --socket-path=s --blk-file=p", "x serve --socket-path=s --blk-file=p");
    check("x --help", "x --help");
    check("x -V", "x -V");
    check("x status --json", "x status --json");
    check("x", "x");
}

#[test]
fn the_transport_is_no_option_for_users() {
    let mut command = Args::command();
    let serve = command.find_subcommand_mut("serve").unwrap();
    for help in [serve.render_help(), serve.render_long_help()] {
        assert!(!help.to_string().contains("transport"), "{help}");
    }
}

#[test]
fn the_arguments_are_consistent() {
    Args::command().debug_assert();
}

#[test]
fn every_subcommand_has_an_example_that_parses() {
    fn check(command: &clap::Command, seen: &mut usize) {
        for sub in command.get_subcommands().filter(|c| c.get_name() != "help") {
            if sub.has_subcommands() {
                check(sub, seen);
                continue;
            }
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples: Vec<_> = help.lines().filter_map(|l| l.strip_prefix("  vhost-remap ")).collect();
            assert!(help.starts_with("Example") && !examples.is_empty(), "{} has no example", sub.get_name());
            for example in examples {
                let words = std::iter::once("vhost-remap").chain(example.split_whitespace());
                if let Err(error) = Args::try_parse_from(words) {
                    panic!("the example of {} does not parse: {error}", sub.get_name());
                }
            }
            *seen += 1;
        }
    }
    let mut seen = 0;
    check(&Args::command(), &mut seen);
    assert!(seen >= 15, "only {seen} subcommands were checked");
}

/// Takes so many lines, then the reader is gone.
struct Reader {
    lines: usize,
    seen: String,
}

impl std::io::Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.seen.lines().count() >= self.lines && self.seen.ends_with('\n') {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.seen.push_str(std::str::from_utf8(bytes).unwrap());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn follow_prints_events_as_they_come_until_nobody_reads() {
    let (running, volume) = Running::one(ScriptedVolume::new());
    let path = running.path();
    let following = std::thread::spawn(move || {
        let args = Args::parse_from(["x", "events", "--follow", "--control-path", path.to_str().unwrap()]);
        let mut reader = Reader { lines: 2, seen: String::new() };
        (run(args, &mut reader), reader.seen)
    });
    for seq in 1..=3 {
        volume.events.lock().unwrap().push(event(seq));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (result, seen) = following.join().unwrap();
    assert_eq!(result.unwrap_err().exit_status(), 0);
    assert!(seen.contains(" #1 ") && seen.contains(" #2 ") && !seen.contains(" #3 "), "{seen}");
}
