//! The operator's way in: HTTP/1.1 on a Unix socket, served by a thread of its own.
//!
//! [`server`] answers, [`client`] asks, [`api`] is what they say to each other, [`socket`] makes and removes
//! socket files. Nothing here touches a disk or waits for one on the protocol thread: orders go to the
//! volume's healer as messages, from threads of this module.

pub mod access;
pub mod api;
mod bounded;
pub mod client;
mod faults;
pub mod log_level;
pub mod metrics;
mod page;
pub mod proc_text;
mod routes;
pub mod schema;
pub mod server;
pub mod socket;
#[cfg(test)]
pub(crate) mod tests;
pub mod volume;
