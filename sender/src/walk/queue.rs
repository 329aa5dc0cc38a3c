//! What the threads of a walk hand to each other, and how they find out that there is nothing more.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Batch, MAX_WAITING, Node, WalkError};

/// Something to do.
pub(super) enum Work<D> {
    Directory(Arc<Node<D>>),
    Batch(Batch<D>),
}

/// The queue. Batches first, so that they do not pile up; of directories the one found last, so that those do not.
pub(super) struct Queue<D> {
    state: Mutex<State<D>>,
    changed: Condvar,
    ended: Condvar,
    /// The length of `directories`, to be read without the lock.
    waiting: AtomicUsize,
    failed: AtomicBool,
    max_batches: usize,
}

struct State<D> {
    directories: Vec<Arc<Node<D>>>,
    batches: Vec<Batch<D>>,
    /// Threads that are at work and may find more of it.
    busy: usize,
    error: Option<WalkError>,
    /// Nothing more will come.
    ended: bool,
}

/// Held by a thread for as long as it is at work. If it panics, the walk ends.
pub(super) struct Busy<'a, D>(&'a Queue<D>);

impl<D> Queue<D> {
    pub(super) fn new(threads: usize) -> Self {
        let state = State { directories: Vec::new(), batches: Vec::new(), busy: 0, error: None, ended: false };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            ended: Condvar::new(),
            waiting: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            max_batches: 2 * threads,
        }
    }

    /// A panic elsewhere ends the walk; until then the state is as good as ever.
    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push_directory(&self, node: Arc<Node<D>>) {
        let mut state = self.lock();
        state.directories.push(node);
        self.waiting.store(state.directories.len(), Ordering::Relaxed);
        drop(state);
        self.changed.notify_one();
    }

    /// Gives a batch to others, if there are not enough of them already.
    pub(super) fn offer(&self, batch: Batch<D>) -> Result<(), Batch<D>> {
        let mut state = self.lock();
        if state.batches.len() >= self.max_batches {
            return Err(batch);
        }
        state.batches.push(batch);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// Whether directories should be entered rather than pushed.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) >= MAX_WAITING
    }

    /// Something to do; waits for it. None at the end.
    pub(super) fn next(&self) -> Option<(Work<D>, Busy<'_, D>)> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            let batch = state.batches.pop().map(Work::Batch);
            let work = batch.or_else(|| state.directories.pop().map(Work::Directory));
            if let Some(work) = work {
                self.waiting.store(state.directories.len(), Ordering::Relaxed);
                state.busy += 1;
                return Some((work, Busy(self)));
            }
            if state.busy == 0 {
                self.end(state);
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Ends the walk. The first error counts, unless it only says that the walk ended.
    pub(super) fn fail(&self, error: WalkError) {
        let mut state = self.lock();
        self.failed.store(true, Ordering::Relaxed);
        if !matches!(state.error, Some(WalkError::Call { .. })) {
            state.error = Some(error);
        }
        self.end(state);
    }

    fn end(&self, mut state: MutexGuard<'_, State<D>>) {
        state.ended = true;
        drop(state);
        self.changed.notify_all();
        self.ended.notify_all();
    }

    /// Waits for the end, at most so long. Whether it has come.
    pub(super) fn wait_for_end(&self, limit: Duration) -> bool {
        let state = self.lock();
        let waited = self.ended.wait_timeout_while(state, limit, |state| !state.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    pub(super) fn into_result(self) -> Result<(), WalkError> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.error.map_or(Ok(()), Err)
    }
}

impl<D> Drop for Busy<'_, D> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.busy -= 1;
        let idle = state.busy == 0 && state.directories.is_empty() && state.batches.is_empty();
        if idle || std::thread::panicking() {
            self.0.end(state);
        }
    }
}
