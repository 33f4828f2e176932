//! Tasks of the healer: straight-line `async` code under a deterministic, single-threaded executor.
//!
//! The healer's work is long sequences with waits between the steps (read, retry, write, flush, commit).
//! Written as `async` they read like the contract; driven by this executor they stay a state machine:
//! nothing runs but in [`Executor::run`], in the order in which it was woken, and what they wait for
//! comes in from outside.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Numbers of the tasks to poll, oldest first. Shared with wakers, which must be `Send` by their type.
#[derive(Default)]
struct Ready(Mutex<VecDeque<usize>>);

impl Ready {
    fn push(&self, task: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(task);
    }

    fn pop(&self) -> Option<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

struct TaskWaker {
    task: usize,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.push(self.task);
    }
}

/// Starts tasks, from inside other tasks too.
#[derive(Clone, Default)]
pub(super) struct Spawner(Rc<RefCell<VecDeque<Task>>>);

impl Spawner {
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        // Before the list is borrowed: a task of some kilobytes is then moved only once.
        let task = Box::pin(task);
        self.0.borrow_mut().push_back(task);
    }
}

/// Runs tasks until all of them wait.
#[derive(Default)]
pub(super) struct Executor {
    /// By number: the task, and a waker of whoever has that number.
    tasks: Vec<(Option<Task>, Waker)>,
    free: Vec<usize>,
    ready: Arc<Ready>,
    spawner: Spawner,
}

impl Executor {
    pub(super) fn spawner(&self) -> Spawner {
        self.spawner.clone()
    }

    /// Number of tasks that have not ended.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.tasks.len() - self.free.len() + self.spawner.0.borrow().len()
    }

    /// Poll what is ready, and what that wakes, until nothing is.
    pub(super) fn run(&mut self) {
        loop {
            self.admit();
            let Some(index) = self.ready.pop() else { return };
            // A waker may outlive its task; its number may then belong to another, which is merely polled.
            let (Some(task), waker) = &mut self.tasks[index] else { continue };
            if task.as_mut().poll(&mut Context::from_waker(waker)).is_ready() {
                self.tasks[index].0 = None;
                self.free.push(index);
            }
        }
    }

    fn admit(&mut self) {
        loop {
            let Some(task) = self.spawner.0.borrow_mut().pop_front() else { return };
            let index = self.free.pop().unwrap_or(self.tasks.len());
            if index == self.tasks.len() {
                let waker = TaskWaker { task: index, ready: self.ready.clone() };
                self.tasks.push((None, Waker::from(Arc::new(waker))));
            }
            self.tasks[index].0 = Some(task);
            self.ready.push(index);
        }
    }
}

impl Drop for Executor {
    /// Tasks that were spawned and never admitted own what owns the spawner: nobody else would drop them.
    fn drop(&mut self) {
        let spawned = std::mem::take(&mut *self.spawner.0.borrow_mut());
        drop(spawned);
    }
}

struct Cell<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// The end of a one-value channel that gives the value.
pub(super) struct Promise<T>(Rc<RefCell<Cell<T>>>);

/// The end that waits for it.
pub(super) struct Awaited<T>(Rc<RefCell<Cell<T>>>);

/// A channel for one value. A promise must be kept: one that is dropped leaves its task waiting.
pub(super) fn promise<T>() -> (Promise<T>, Awaited<T>) {
    let cell = Rc::new(RefCell::new(Cell { value: None, waker: None }));
    (Promise(cell.clone()), Awaited(cell))
}

impl<T> Promise<T> {
    pub(super) fn keep(self, value: T) {
        let waker = {
            let mut cell = self.0.borrow_mut();
            cell.value = Some(value);
            cell.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Awaited<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut cell = self.0.borrow_mut();
        match cell.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                cell.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// Counted permits, given out in the order they were asked for.
pub(super) struct Permits(RefCell<(usize, VecDeque<Promise<()>>)>);

impl Permits {
    pub(super) fn new(count: usize) -> Permits {
        Permits(RefCell::new((count, VecDeque::new())))
    }

    /// Wait for a permit; give it back with [`Permits::release`].
    pub(super) async fn acquire(&self) {
        let waiting = {
            let mut inner = self.0.borrow_mut();
            if inner.0 > 0 {
                inner.0 -= 1;
                return;
            }
            let (promise, awaited) = promise();
            inner.1.push_back(promise);
            awaited
        };
        waiting.await;
    }

    pub(super) fn release(&self) {
        let next = {
            let mut inner = self.0.borrow_mut();
            let next = inner.1.pop_front();
            if next.is_none() {
                inner.0 += 1;
            }
            next
        };
        if let Some(next) = next {
            next.keep(());
        }
    }
}

/// The results of `futures`, in their order, run side by side.
pub(super) async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    enum Member<F: Future> {
        Running(Pin<Box<F>>),
        Done(Option<F::Output>),
    }
    let mut members: Vec<Member<F>> = futures.into_iter().map(|f| Member::Running(Box::pin(f))).collect();
    std::future::poll_fn(move |context| {
        let mut pending = false;
        for member in &mut members {
            if let Member::Running(future) = member {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => *member = Member::Done(Some(value)),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            return Poll::Pending;
        }
        let take = |member: &mut Member<F>| match member {
            Member::Done(value) => value.take().expect("taken once, here"),
            Member::Running(_) => unreachable!("all are done"),
        };
        Poll::Ready(members.iter_mut().map(take).collect())
    })
    .await
}

/// Whichever of the two ends first; a tie goes to the first. The other is dropped.
pub(super) async fn first_of<A: Future, B: Future>(a: A, b: B) -> Result<A::Output, B::Output> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    std::future::poll_fn(move |context| {
        if let Poll::Ready(value) = a.as_mut().poll(context) {
            return Poll::Ready(Ok(value));
        }
        b.as_mut().poll(context).map(Err)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_given_in_order_and_tasks_end() {
        let mut executor = Executor::default();
        let permits = Rc::new(Permits::new(1));
        let order = Rc::new(RefCell::new(Vec::new()));
        let (gate, wait) = promise();
        let (p, o) = (permits.clone(), order.clone());
        executor.spawner().spawn(async move {
            p.acquire().await;
            wait.await;
            o.borrow_mut().push(0);
            p.release();
        });
        for n in 1..4 {
            let (p, o) = (permits.clone(), order.clone());
            executor.spawner().spawn(async move {
                p.acquire().await;
                o.borrow_mut().push(n);
                p.release();
            });
        }
        executor.run();
        assert_eq!((executor.len(), order.borrow().len()), (4, 0));
        gate.keep(());
        executor.run();
        assert_eq!(*order.borrow(), [0, 1, 2, 3]);
        assert_eq!(executor.len(), 0);
    }

    #[test]
    fn an_executor_drops_tasks_that_never_ran() {
        let executor = Executor::default();
        let (spawner, owned) = (executor.spawner(), Rc::new(()));
        let (of_the_task, spawner_of_the_task) = (owned.clone(), spawner.clone());
        spawner.spawn(async move { drop((of_the_task, spawner_of_the_task)) });
        drop((executor, spawner));
        assert_eq!(Rc::strong_count(&owned), 1);
    }
}
