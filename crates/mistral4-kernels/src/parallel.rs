//! Work cut into numbered tasks on a team of threads.
use crate::team;
use std::marker::PhantomData;
use std::ops::Range;

/// Runs `task(0) .. task(count - 1)`, on several threads when there is more than one of both.
pub(crate) fn for_each(count: usize, task: impl Fn(usize) + Sync + Send) {
    let threads = rayon::current_num_threads().min(count);
    if threads <= 1 || !team::run(threads, count, &task) {
        (0..count).for_each(task);
    }
}

/// Cuts `0..len` into pieces of `chunk` and runs `task` on each.
pub(crate) fn for_each_chunk(len: usize, chunk: usize, task: impl Fn(Range<usize>) + Sync + Send) {
    for_each(len.div_ceil(chunk), |i| task(i * chunk..((i + 1) * chunk).min(len)));
}

/// A mutable slice from which tasks borrow disjoint parts.
pub(crate) struct Shared<'a, T> {
    ptr: *mut T,
    len: usize,
    _slice: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<'_, T> {}

// SAFETY: the parts handed out are disjoint (the contract of `slice`), so sending them to other threads is
// the same as sending `&mut [T]`.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { ptr: slice.as_mut_ptr(), len: slice.len(), _slice: PhantomData }
    }

    /// # Safety
    /// No two live borrows overlap, on this or another thread.
    #[allow(clippy::mut_from_ref, reason = "disjoint parts of one slice are borrowed by several tasks")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// Where `range`, which must lie in the slice, begins; it may hold what other tasks borrow.
    pub(crate) fn ptr(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion.
        unsafe { self.ptr.add(range.start) }
    }

    /// # Safety
    /// Nobody borrows the slice mutably while this borrow lives.
    pub(crate) unsafe fn read(&self) -> &'a [T] {
        // SAFETY: the whole slice, not aliased mutably by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}
