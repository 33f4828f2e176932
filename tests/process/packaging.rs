//! What comes with the program for QEMU's management layers, libvirt and systemd.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;
use tempfile::TempDir;

use crate::disks::run;
use crate::frontend::{FrontEnd, Setup};
use crate::guest::Guest;
use crate::inputs::skip;
use crate::server::{Server, Volume, done, vhost_remap};

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("ci/packaging")
}

/// As `make install` does it, with the program at hand in place of the one it builds.
fn installed() -> TempDir {
    let dir = TempDir::new().unwrap();
    run(Command::new(packaging().join("install")).arg(dir.path()).arg("/usr")).unwrap();
    let program = dir.path().join("usr/bin/vhost-remap");
    fs::create_dir_all(program.parent().unwrap()).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_vhost-remap"), program).unwrap();
    dir
}

/// QEMU's `docs/interop/vhost-user.json` has three members, and the program answers as a backend of that type.
#[test]
fn the_descriptor_for_management_layers_names_a_block_backend() {
    let installed = installed();
    let text = fs::read(installed.path().join("usr/share/qemu/vhost-user/50-vhost-remap.json")).unwrap();
    let descriptor: Value = serde_json::from_slice(&text).unwrap();
    let members: Vec<&String> = descriptor.as_object().unwrap().keys().collect();
    assert_eq!(members, ["binary", "description", "type"]);
    assert_eq!((&descriptor["type"], &descriptor["binary"]), (&"block".into(), &"/usr/bin/vhost-remap".into()));
    let capabilities: Value = serde_json::from_str(&done(&vhost_remap(&["--print-capabilities"]))).unwrap();
    assert_eq!(capabilities["type"], descriptor["type"]);
}

#[test]
fn libvirt_takes_the_domain_of_the_readme() {
    let domain = packaging().join("libvirt-domain.xml");
    let text = fs::read_to_string(&domain).unwrap();
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, after) = readme.split_once("```xml\n").expect("the README has a disk for libvirt");
    let (disk, _) = after.split_once("```").expect("which ends");
    assert!(text.contains(disk), "the README's disk is another one");
    if let Err(why) = Command::new("virt-xml-validate").arg("--version").output() {
        return skip("libvirt_takes_the_domain_of_the_readme", format!("virt-xml-validate: {why}"));
    }
    run(Command::new("virt-xml-validate").arg(&domain).arg("domain")).unwrap();
}

#[test]
fn systemd_takes_the_units() {
    let name = "systemd_takes_the_units";
    if let Err(why) = Command::new("systemd-analyze").arg("--version").output() {
        return skip(name, format!("systemd-analyze: {why}"));
    }
    let installed = installed();
    let units = installed.path().join("usr/lib/systemd/system");
    // Templates are looked at as what they make; the program is where it is.
    for kind in ["socket", "service"] {
        let text = fs::read_to_string(units.join(format!("vhost-remap@.{kind}"))).unwrap();
        let text = text.replace("/usr/bin/", &format!("{}/usr/bin/", installed.path().display()));
        fs::write(units.join(format!("vhost-remap@vm1.{kind}")), text).unwrap();
    }
    for kind in ["socket", "service"] {
        let unit = units.join(format!("vhost-remap@vm1.{kind}"));
        let output = Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&unit).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        // It also looks at what the machine has installed, and says which unit a line is about.
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("vhost-remap")).collect();
        assert!(output.status.success() && ours.is_empty(), "{kind}: {said}");
    }
}

/// O3: the socket belongs to whoever starts the server. A front-end that comes while no server runs waits in it.
#[test]
fn a_connection_that_is_made_while_no_server_runs_is_served_by_the_next() {
    let volume = Volume::create(32, 64);
    let listener = UnixListener::bind(volume.socket()).unwrap();
    let start = || {
        let listener = listener.try_clone().unwrap();
        fcntl_setfd(&listener, FdFlags::empty()).unwrap();
        let ctl = volume.dir.path().join("vm.sock.ctl");
        let fd = listener.as_raw_fd().to_string();
        let command = volume.command_without_socket(&["--fd", &fd, "--control-path", ctl.to_str().unwrap()]);
        let server = Server::start(command, volume.dir.path()).unwrap();
        drop(OwnedFd::from(listener));
        server
    };
    let setup = Setup { queues: 1, size: 16, without: 0 };
    for killed in [false, true] {
        let server = start();
        drop(server.guest(1));
        if killed {
            server.kill()
        } else {
            server.stop()
        }
        let waiting = UnixStream::connect(volume.socket()).expect("the socket is there");
        let server = start();
        drop(FrontEnd::over(waiting, setup));
        assert_eq!(Guest::connect(&volume.socket(), 1).read(0, 1), Ok(vec![0; 512]));
        server.stop();
    }
}
