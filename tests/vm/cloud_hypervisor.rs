//! A guest of cloud-hypervisor, where that program is there and KVM works.

use std::env;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::guest::{guests, root};
use crate::server::Server;

const LIMIT: Duration = Duration::from_secs(60);

fn program() -> Option<PathBuf> {
    let named = env::var_os("CLOUD_HYPERVISOR").map(PathBuf::from);
    let in_path = || {
        let path = env::var_os("PATH")?;
        env::split_paths(&path).map(|folder| folder.join("cloud-hypervisor")).find(|program| program.is_file())
    };
    named.or_else(in_path)
}

fn skip(why: &str) {
    writeln!(std::io::stdout(), "SKIP cloud-hypervisor: {why}").expect("standard output");
}

fn run_guest(script: &Path, options: &[&str]) -> bool {
    let mut run = Command::new(root().join("vm-images/run"));
    run.arg("--script").arg(script).args(options).stdin(Stdio::null()).stdout(Stdio::null());
    run.status().expect("bash").success()
}

/// cloud-hypervisor has nothing but KVM, under which the guests of some machines hang.
fn has_kvm(server: &Server) -> bool {
    let script = server.dir().join("kvm.sh");
    fs::write(&script, "dmesg | grep -q 'Hypervisor detected: KVM'").expect("a script");
    run_guest(&script, &[])
}

/// Killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_of_cloud_hypervisor_uses_the_disk() {
    let Some(program) = program() else {
        return skip("no program of that name on the PATH, and none named by CLOUD_HYPERVISOR");
    };
    let Some(_turn) = guests() else { return };
    let server = Server::start("128M", 2);
    if !has_kvm(&server) {
        return skip("no guest runs under KVM here");
    }
    let scripts = root().join("tests/vm");
    let common = format!("common.sh={}", scripts.join("common.sh").display());
    let folder = server.dir().join("guest");
    let pack = ["--file", &common, "--pack", folder.to_str().expect("UTF-8")];
    assert!(run_guest(&scripts.join("cloud_hypervisor.sh"), &pack), "no guest was packed");

    let (console, said) = (server.dir().join("console"), server.dir().join("said"));
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).args(["--cpus", "boot=2", "--memory", "size=512M,shared=on"]);
    command.arg("--kernel").arg(folder.join("vmlinuz")).arg("--initramfs").arg(folder.join("initrd.img"));
    command.arg("--cmdline").arg(fs::read_to_string(folder.join("cmdline")).expect("packed").trim_end());
    command
        .arg("--disk")
        .arg(format!("vhost_user=on,socket={},num_queues=2,queue_size=128", server.socket().display()));
    command.args(["--console", "off", "--serial"]).arg(format!("file={}", console.display()));
    let output = File::create(&said).expect("a file");
    command.stdin(Stdio::null()).stdout(output.try_clone().expect("a descriptor")).stderr(output);
    let mut vmm = Running(command.spawn().expect("setpriv is part of every Linux"));
    let text = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = vmm.0.try_wait().expect("our child") {
            break status;
        }
        assert!(Instant::now() < deadline, "no end within {LIMIT:?}: {}\n{}", text(&said), text(&console));
        std::thread::sleep(Duration::from_millis(50));
    };
    let passed = status.success() && text(&console).contains("all is well");
    assert!(passed, "{status}: {}\n{}", text(&said), text(&console));
    server.assert_unnoticed();
    let counters = server.status().counters;
    assert!(counters.reads > 0 && counters.writes > 0 && counters.flushes > 0, "{counters:?}");
}
