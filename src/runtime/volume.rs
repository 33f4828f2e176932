//! Making volumes.

use super::options::{AdoptOptions, CreateOptions};

/// Why no volume was made: one line that names the device, the number and what to do.
#[derive(Debug, thiserror::Error)]
pub enum MakeError {
    /// It was refused.
    #[error("{0}")]
    Refused(String),
}

/// Make a volume on an empty primary; the answer is one line for a person.
///
/// # Errors
/// When a device is not fit, or cannot be written.
pub fn create(options: &CreateOptions) -> Result<String, MakeError> {
    Err(MakeError::Refused(format!("{}: this build cannot create volumes", options.primary.display())))
}

/// Make a volume around an existing image; the answer is one line for a person.
///
/// # Errors
/// When a device is not fit, or the spare cannot be written.
pub fn adopt(options: &AdoptOptions) -> Result<String, MakeError> {
    Err(MakeError::Refused(format!("{}: this build cannot adopt volumes", options.primary.display())))
}
