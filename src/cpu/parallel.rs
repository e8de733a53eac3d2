//! Tasks that threads take in a fixed order, slices that several tasks write to, and semaphores that order their additions.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A call with fewer multiply-adds runs on one thread. It takes about 10 us there (two-core Sapphire Rapids Xeon), and a second
/// thread would start too late to help.
const MIN_PARALLEL_MULTIPLY_ADDS: usize = 1 << 19;

/// Calls `work` for each task of `0..count` on the threads of the current rayon pool.
///
/// `multiply_adds` is the cost of all tasks together. It decides whether more than one thread runs.
///
/// Threads take the tasks in ascending order, so the most expensive tasks belong first. A task may wait for an earlier
/// one, because a running thread has already taken that one. Each thread makes its `scratch` once.
pub(super) fn for_each_task<S>(
    count: usize,
    multiply_adds: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let run = || {
        // Before the first task is taken: if `scratch` panics, no other task waits for one that this thread has taken.
        let mut scratch = scratch();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= count {
                return;
            }
            work(&mut scratch, task);
        }
    };
    let parallel = multiply_adds >= MIN_PARALLEL_MULTIPLY_ADDS;
    let threads = if parallel { rayon::current_num_threads().min(count) } else { 1 };
    match threads {
        0 => {}
        1 => run(),
        _ => rayon::scope(|scope| (0..threads).for_each(|_| scope.spawn(|_| run()))),
    }
}

/// A slice that several tasks write to at the same time, each to other elements.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: all parts belong to one exclusive borrow. Callers of the unsafe methods promise that the parts do not overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other reference to any of these elements may exist while the result is in use.
    #[allow(clippy::mut_from_ref)] // the caller promises exclusive access
    pub(super) unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "{start} + {len} is past {}", self.len);
        // SAFETY: within the borrowed slice; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// A pointer to element `start` of a block that spans `span` elements.
    pub(super) fn block(&self, start: usize, span: usize) -> *mut T {
        assert!(start <= self.len && span <= self.len - start, "{start} + {span} is past {}", self.len);
        // SAFETY: within the borrowed slice.
        unsafe { self.start.add(start) }
    }
}

/// Semaphores that let tasks add to shared tiles of dq in a fixed order. So rounding does not depend on timing.
pub(super) struct DqSemaphores {
    /// For each semaphore, the number that may add next.
    next: Vec<AtomicUsize>,
    /// Whether a task panicked. The semaphores that it holds or waits for never advance again.
    poisoned: AtomicBool,
}

impl DqSemaphores {
    /// One semaphore for each item of `first`. The item is the number that may add first.
    pub(super) fn new(first: impl Iterator<Item = usize>) -> Self {
        Self { next: first.map(AtomicUsize::new).collect(), poisoned: AtomicBool::new(false) }
    }

    /// Waits until `number` is next on this semaphore, runs `add`, and lets `number + 1` go next.
    ///
    /// # Panics
    /// If another task panicked: this one might wait forever.
    pub(super) fn in_order<R>(&self, semaphore: usize, number: usize, add: impl FnOnce() -> R) -> R {
        // Tasks of neighbouring key tiles of a head visit the same query tiles, each one step after the other. So a thread
        // waits at its first query tile, one step for each thread that started earlier, and later hardly ever.
        // A spin takes 24 ns (AMD EPYC), so all take 0.1 ms, about a step at head_dim 64. Other numbers were not measured.
        const SPINS: usize = 1 << 12;
        let next = &self.next[semaphore];
        let mut tries = 0;
        while next.load(Ordering::Acquire) != number {
            assert!(!self.poisoned.load(Ordering::Relaxed), "an earlier task panicked");
            tries += 1;
            if tries < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let result = add();
        next.store(number + 1, Ordering::Release);
        result
    }

    /// Runs a task that uses the semaphores. If it panics, tasks that wait for it panic too instead of waiting forever.
    pub(super) fn guard<R>(&self, task: impl FnOnce() -> R) -> R {
        struct PoisonOnDrop<'a>(&'a AtomicBool);
        impl Drop for PoisonOnDrop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let poison = PoisonOnDrop(&self.poisoned);
        let result = task();
        std::mem::forget(poison);
        result
    }
}
