//! Which blocks make a piece fail, or slow: it is read in parts, and those block by block.

use std::rc::Rc;

use super::examine::Trouble;
use super::pass::PATIENCE_LOST;
use super::read::{PART_BLOCKS, Piece, Read, SLOW_NS};
use super::{Step, Stopped, Turn};
use crate::device::Errno;
use crate::engine::healer::Core;
use crate::units::Time;

/// A block is slow if it takes so many times as long as its neighbours (the lower quartile of its part).
const SLOW_BLOCK: u64 = 5;
/// Times a slow block is read again, and slow each time, before it is called so.
const CONFIRMATIONS: usize = 2;
/// Times it is read while the guest's own requests take longer than usual, which says nothing of the block; and how
/// long that is waited for, in nanoseconds (100 ms).
const CALM_TRIES: usize = 20;
const CALM_NS: u64 = 100_000_000;

/// How a slow block was when it was read again.
enum Again {
    Fast,
    Slow,
    Failed(Errno),
    /// The device has gone, which says nothing of the block.
    Gone,
}

impl Core {
    /// Find the blocks that make a piece fail, or slow.
    pub(super) async fn narrow(self: &Rc<Self>, turn: Turn, piece: &Piece) -> Result<Step, Stopped> {
        for (at, part) in (0..).step_by(PART_BLOCKS).zip(piece.parts(PART_BLOCKS)) {
            if self.of_pass(turn, |pass| pass.has_lost_patience())? {
                return self.leave_out(turn, &piece.part(at, piece.blocks.len()));
            }
            // A piece as small as that has just been read.
            if piece.blocks.len() > PART_BLOCKS {
                match self.read_piece(turn, &part).await? {
                    Read::Well => continue,
                    Read::Slowly | Read::Not => {}
                    Read::Gone => return Ok(Step::Again),
                }
            }
            if self.narrow_part(turn, &part).await? == Step::Again {
                return Ok(Step::Again);
            }
        }
        Ok(Step::Done)
    }

    /// A piece, or what is left of it, fails, and is not looked at any more.
    fn leave_out(&self, turn: Turn, piece: &Piece) -> Result<Step, Stopped> {
        self.skip(turn, piece.device, piece.offset, piece.len, PATIENCE_LOST.to_owned())
    }

    async fn narrow_part(self: &Rc<Self>, turn: Turn, part: &Piece) -> Result<Step, Stopped> {
        let mut failing = Vec::new();
        let mut times = Vec::new();
        for (at, single) in part.parts(1).into_iter().enumerate() {
            if self.of_pass(turn, |pass| pass.has_lost_patience())? {
                if self.leave_out(turn, &part.part(at, part.blocks.len()))? == Step::Again {
                    return Ok(Step::Again);
                }
                break;
            }
            if self.of_pass(turn, |pass| pass.takes_device_away(&single.blocks))? {
                // It is left alone.
                if self.examine(turn, single.blocks[0], Trouble::Known).await? == Step::Again {
                    return Ok(Step::Again);
                }
                continue;
            }
            match self.read_there(turn, &single).await? {
                None => return Ok(Step::Again),
                Some((Ok(()), took)) => times.push((single, took)),
                Some((Err(errno), _)) => failing.push((single, errno)),
            }
        }
        for (single, errno) in failing {
            if self.examine(turn, single.blocks[0], Trouble::Failed(&single, errno)).await? == Step::Again {
                return Ok(Step::Again);
            }
        }
        let mut sorted: Vec<u64> = times.iter().map(|(_, took)| *took).collect();
        sorted.sort_unstable();
        // Of a busy machine, where half of all reads may wait for something, the faster ones tell what the disk takes.
        let usual = sorted.get(sorted.len() / 4).copied().unwrap_or(0);
        let slow_ns = SLOW_NS.max(usual * SLOW_BLOCK);
        for (single, took) in times {
            if took < slow_ns || self.of_pass(turn, |pass| pass.has_lost_patience())? {
                continue;
            }
            match self.read_again(turn, &single, slow_ns).await? {
                Again::Fast => continue,
                Again::Slow => {}
                Again::Gone => return Ok(Step::Again),
                Again::Failed(errno) => {
                    if self.examine(turn, single.blocks[0], Trouble::Failed(&single, errno)).await? == Step::Again {
                        return Ok(Step::Again);
                    }
                    continue;
                }
            }
            let cause = format!("{} ms, and again, where {} ms are usual", took / 1_000_000, usual / 1_000_000);
            if self.examine(turn, single.blocks[0], Trouble::Slow(&single, &cause)).await? == Step::Again {
                return Ok(Step::Again);
            }
        }
        Ok(Step::Done)
    }

    /// Read a slow block again: whether it is slow each time, also while the guest is served as usual.
    async fn read_again(self: &Rc<Self>, turn: Turn, single: &Piece, slow_ns: u64) -> Result<Again, Stopped> {
        let mut confirmed = 0;
        for _ in 0..CONFIRMATIONS + CALM_TRIES {
            let Some((result, took)) = self.read_there(turn, single).await? else { return Ok(Again::Gone) };
            if let Err(errno) = result {
                return Ok(Again::Failed(errno));
            }
            let is_over = self.of_pass(turn, |pass| {
                pass.has_trouble_for(took);
                pass.has_lost_patience()
            })?;
            if took < slow_ns || is_over {
                return Ok(Again::Fast);
            }
            if self.is_calm() {
                confirmed += 1;
            } else {
                self.io.sleep_until(Time(self.io.now().0 + CALM_NS)).await;
            }
            if confirmed == CONFIRMATIONS {
                return Ok(Again::Slow);
            }
        }
        Ok(Again::Fast)
    }

    fn is_calm(&self) -> bool {
        let load = self.scan.load.get();
        self.scan.pace.borrow().as_ref().is_none_or(|pace| pace.is_calm(load))
    }
}
