//! Tasks handed to threads in order, outputs that several tasks write to, and turns for sums that they share.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Multiply-adds below which a call is over before a second thread has woken up (some 10 us on one core).
const WORTH_A_THREAD: usize = 1 << 19;

/// Calls `work` for each task `0..count` on the threads of the current rayon pool; together they take about
/// `multiply_adds`.
///
/// Threads take tasks in ascending order, so the heaviest belong first, and a task may wait for one before it: that one
/// has been taken by a thread that is running. Each thread makes its `scratch` once.
pub(super) fn for_each_task<S>(
    count: usize,
    multiply_adds: usize,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) + Sync,
) {
    let next = AtomicUsize::new(0);
    let run = || {
        // Before a task is taken: what unwinds here leaves no task undone that others wait for.
        let mut scratch = scratch();
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= count {
                return;
            }
            work(&mut scratch, task);
        }
    };
    let threads = if multiply_adds < WORTH_A_THREAD { 1 } else { rayon::current_num_threads().min(count) };
    match threads {
        0 => {}
        1 => run(),
        _ => rayon::scope(|scope| (0..threads).for_each(|_| scope.spawn(|_| run()))),
    }
}

/// A slice that tasks write to in places that never overlap at the same time.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out parts of one exclusive borrow; the callers of its unsafe methods keep those parts apart.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other reference to any of these elements may exist while the result is in use.
    #[allow(clippy::mut_from_ref)] // that is what the type is for
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

/// Lets tasks add to shared sums one after the other in a fixed order, so that rounding never depends on timing.
pub(super) struct Turns {
    next: Vec<AtomicUsize>,
    abandoned: AtomicBool,
}

impl Turns {
    /// One sum for each item; the item is the number whose turn comes first.
    pub(super) fn new(first: impl Iterator<Item = usize>) -> Self {
        Self { next: first.map(AtomicUsize::new).collect(), abandoned: AtomicBool::new(false) }
    }

    /// Runs `add` once every earlier number has run on this sum, then passes the turn on.
    ///
    /// # Panics
    /// If a task with an earlier number panicked: its turn would never be passed on.
    pub(super) fn take<R>(&self, sum: usize, number: usize, add: impl FnOnce() -> R) -> R {
        // Neighbouring tasks of one head walk the same tiles, one step behind each other: at the start a thread waits for
        // as many steps as there are threads ahead of it, and then hardly ever.
        const SPINS: usize = 1 << 12;
        let mut tries = 0;
        while self.next[sum].load(Ordering::Acquire) != number {
            assert!(!self.abandoned.load(Ordering::Relaxed), "a task ahead of this one panicked");
            tries += 1;
            if tries < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let result = add();
        self.next[sum].store(number + 1, Ordering::Release);
        result
    }

    /// Runs a task that takes turns; if it panics, those who wait for its turns panic too instead of waiting for ever.
    pub(super) fn during<R>(&self, task: impl FnOnce() -> R) -> R {
        struct Abandon<'a>(&'a AtomicBool);
        impl Drop for Abandon<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let abandon = Abandon(&self.abandoned);
        let result = task();
        std::mem::forget(abandon);
        result
    }
}
