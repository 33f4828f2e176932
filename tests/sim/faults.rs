//! What goes wrong, and when.

use crate::world::World;

/// One of the faults this run knows strikes.
pub(crate) fn inject(_world: &mut World) {}

/// What happens to the devices while nobody uses them.
pub(crate) fn between_sessions(_world: &mut World) {}
