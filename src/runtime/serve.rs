//! Serving a volume to front-ends until told to stop.

use std::os::fd::OwnedFd;

use super::options::ServeOptions;

/// Why serving did not start, or ended: one line that names the device, the number and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It was refused.
    #[error("{0}")]
    Refused(String),
}

/// Serve until `stop` becomes readable.
///
/// # Errors
/// When a device or socket cannot be opened, or the volume does not close cleanly.
pub fn serve(options: &ServeOptions, stop: OwnedFd) -> Result<(), ServeError> {
    drop(stop);
    Err(ServeError::Refused(format!("{}: this build cannot serve volumes", options.primary.display())))
}
