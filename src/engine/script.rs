//! A sequence of device operations that ends with a result, driven from outside: opening and creating
//! volumes are such scripts, so the simulator can crash in the middle of them.

use std::cell::RefCell;
use std::rc::Rc;

use super::io::Io;
use super::open::OpenError;
use super::task::Executor;
use crate::device::{Completion, Op};
use crate::units::Time;

type Outcome<T> = Rc<RefCell<Option<Result<T, OpenError>>>>;

/// A script under way: submit what it emits, report completions, until it has a result.
pub(super) struct Script<T> {
    pub(super) executor: Executor,
    pub(super) io: Rc<Io>,
    pub(super) outcome: Outcome<T>,
}

impl<T: 'static> Script<T> {
    pub(super) fn start<F: Future<Output = Result<T, OpenError>> + 'static>(
        script: impl FnOnce(Rc<Io>) -> F,
    ) -> Script<T> {
        let executor = Executor::default();
        let io = Rc::new(Io::new(executor.spawner()));
        let outcome: Outcome<T> = Rc::default();
        let (task, result) = (Box::pin(script(io.clone())), outcome.clone());
        executor.spawner().spawn(async move {
            let done = task.await;
            *result.borrow_mut() = Some(done);
        });
        Script { executor, io, outcome }
    }

    pub(super) fn step(&mut self, now: Time, completions: &[Completion], ops: &mut Vec<Op>) {
        self.io.set_now(now);
        completions.iter().for_each(|completion| self.io.completed(*completion));
        self.executor.run();
        self.io.take_ops(ops);
    }
}
