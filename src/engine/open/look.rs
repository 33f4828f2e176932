//! What a volume is, from its superblocks alone: another process may be serving it meanwhile.

use super::check::check_devices;
use super::{DeviceFacts, OpenError, superblocks};
use crate::device::{Completion, DeviceIndex, Op};
use crate::engine::script::Script;
use crate::units::Time;
use crate::volume::superblock::Superblock;

/// A look under way. Nothing is written, and nothing is promised of what an opening will find.
pub struct Look(Script<Superblock>);

impl Look {
    /// Begin; nothing is done before the first [`Look::step`].
    pub fn new(primary: DeviceFacts, spare: DeviceFacts) -> Look {
        Look(Script::start(|io| async move {
            let found = superblocks::find(&io, spare.size).await?;
            let superblock = superblocks::choose(&found)?;
            superblocks::check_features(&superblock, DeviceIndex::SPARE)?;
            check_devices(&superblock, &primary, &spare)?;
            Ok(superblock)
        }))
    }

    /// Report what has completed, and get the operations to submit. Finished when [`Look::result`] is there.
    pub fn step(&mut self, now: Time, completions: &[Completion], ops: &mut Vec<Op>) {
        self.0.step(now, completions, ops);
    }

    /// The newest superblock, once it is known.
    ///
    /// # Errors
    /// When there is no volume, or not of these devices.
    pub fn result(&self) -> Option<Result<Superblock, OpenError>> {
        self.0.outcome.borrow().clone()
    }
}
