//! The program as a process: a guest on its vhost-user socket, an operator on its control socket, devices
//! that fail by rule. Numbers of scenarios are those of the predecessor's operators' list.

#[path = "process/chains.rs"]
mod chains;
#[path = "process/clean.rs"]
mod clean;
#[path = "process/crash_points.rs"]
mod crash_points;
#[path = "process/degraded.rs"]
mod degraded;
#[path = "process/disks.rs"]
mod disks;
#[path = "process/drain.rs"]
mod drain;
#[path = "process/exhaustion.rs"]
mod exhaustion;
#[path = "process/faults.rs"]
mod faults;
#[path = "process/flush.rs"]
mod flush;
#[path = "process/framework.rs"]
mod framework;
#[path = "process/frontend.rs"]
mod frontend;
#[path = "process/gone.rs"]
mod gone;
#[path = "process/guest.rs"]
mod guest;
#[path = "process/handover.rs"]
mod handover;
#[path = "process/health.rs"]
mod health;
#[path = "process/inflight.rs"]
mod inflight;
#[path = "process/input_hosts.rs"]
mod input_hosts;
#[path = "process/input_paths.rs"]
mod input_paths;
#[path = "process/input_sockets.rs"]
mod input_sockets;
#[path = "process/input_volumes.rs"]
mod input_volumes;
#[path = "process/input_words.rs"]
mod input_words;
#[path = "process/inputs.rs"]
mod inputs;
#[path = "process/migration.rs"]
mod migration;
#[path = "process/model.rs"]
mod model;
#[path = "process/modes.rs"]
mod modes;
#[path = "process/monitoring.rs"]
mod monitoring;
#[path = "process/notify.rs"]
mod notify;
#[path = "process/operator.rs"]
mod operator;
#[path = "process/packaging.rs"]
mod packaging;
#[path = "process/packed.rs"]
mod packed;
#[expect(dead_code, reason = "the unit tests of the library use the rest")]
#[path = "../src/vhost/testing/packed.rs"]
mod packed_ring;
#[path = "process/page.rs"]
mod page;
#[path = "process/predecessor.rs"]
mod predecessor;
#[path = "process/predecessor_line.rs"]
mod predecessor_line;
#[path = "process/predecessor_metrics.rs"]
mod predecessor_metrics;
#[path = "process/predecessor_verbs.rs"]
mod predecessor_verbs;
#[path = "process/real_devices.rs"]
mod real_devices;
#[path = "process/real_errors.rs"]
mod real_errors;
#[path = "process/real_spare.rs"]
mod real_spare;
#[path = "process/refusals.rs"]
mod refusals;
#[path = "process/resize.rs"]
mod resize;
#[path = "process/restart.rs"]
mod restart;
#[path = "process/scan.rs"]
mod scan;
#[path = "process/scenarios.rs"]
mod scenarios;
#[path = "process/seccomp.rs"]
mod seccomp;
#[path = "process/server.rs"]
mod server;
#[path = "process/sessions.rs"]
mod sessions;
#[path = "process/soak.rs"]
mod soak;
#[path = "process/spare.rs"]
mod spare;
#[path = "process/stats.rs"]
mod stats;
#[path = "process/storm.rs"]
mod storm;
#[path = "process/terminal.rs"]
mod terminal;
#[path = "process/top.rs"]
mod top;
#[path = "process/traces.rs"]
mod traces;
#[path = "process/traces_frontends.rs"]
mod traces_frontends;
#[path = "process/traces_hostile.rs"]
mod traces_hostile;
#[path = "process/traces_messages.rs"]
mod traces_messages;
#[path = "process/transports.rs"]
mod transports;
#[path = "process/upgrade.rs"]
mod upgrade;
#[path = "process/which_file.rs"]
mod which_file;
