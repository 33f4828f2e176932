//! A device that fails what its rules say.

/// The fault rules of one volume, shared by all its devices' queues.
#[derive(Debug, Default)]
pub struct FaultTable {}
