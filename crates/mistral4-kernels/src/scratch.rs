//! Reusable buffers, so that steady work allocates nothing.
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = 64;
/// Buffers kept by one thread; the smallest ones are given back to the system first.
const KEPT: usize = 16;

/// A type whose every bit pattern is a value, so that reused memory may be read as it.
///
/// # Safety
/// Any bytes are a valid value, and the type needs no drop and at most 64-byte alignment.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for u32 {}
// SAFETY: plain numbers.
unsafe impl Plain for i32 {}
// SAFETY: plain numbers.
unsafe impl Plain for i16 {}
// SAFETY: plain numbers.
unsafe impl Plain for i8 {}
// SAFETY: plain numbers.
unsafe impl Plain for half::bf16 {}

struct Block {
    ptr: NonNull<u8>,
    bytes: usize,
}

impl Block {
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGN).expect("scratch size fits the address space")
    }

    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes);
        // SAFETY: `take` asks for at least `ALIGN` bytes, so the size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        Self { ptr: NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout)), bytes }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.bytes)) }
    }
}

// SAFETY: a block owns its memory.
unsafe impl Send for Block {}
// SAFETY: a block gives access only through `Scratch`, by the usual borrow rules.
unsafe impl Sync for Block {}

thread_local! {
    static POOL: RefCell<Vec<Block>> = const { RefCell::new(Vec::new()) };
}

/// A 64-byte aligned buffer with unspecified contents, returned to its thread's pool when dropped.
pub(crate) struct Scratch<T: Plain> {
    block: Option<Block>,
    len: usize,
    _element: PhantomData<T>,
}

/// Takes a buffer of `len` elements; what it holds is left over from earlier uses.
pub(crate) fn take<T: Plain>(len: usize) -> Scratch<T> {
    let bytes = (len * size_of::<T>()).next_multiple_of(ALIGN).max(ALIGN);
    let reused = POOL.with_borrow_mut(|pool| {
        let fits = pool.iter().enumerate().filter(|(_, block)| block.bytes >= bytes);
        let best = fits.min_by_key(|(_, block)| block.bytes).map(|(i, _)| i);
        best.map(|i| pool.swap_remove(i))
    });
    Scratch { block: Some(reused.unwrap_or_else(|| Block::new(bytes))), len, _element: PhantomData }
}

/// Takes a buffer of `len` zeros.
pub(crate) fn zeros(len: usize) -> Scratch<f32> {
    let mut buffer = take(len);
    buffer.fill(0.0);
    buffer
}

impl<T: Plain> Drop for Scratch<T> {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        // While a thread ends its pool may be gone; then the block is simply freed.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            pool.push(block);
            if pool.len() > KEPT {
                let smallest = (0..pool.len()).min_by_key(|&i| pool[i].bytes).unwrap_or(0);
                pool.swap_remove(smallest);
            }
        });
    }
}

impl<T: Plain> Scratch<T> {
    fn ptr(&self) -> *mut T {
        self.block.as_ref().map_or(NonNull::dangling().as_ptr(), |block| block.ptr.as_ptr().cast())
    }
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the block holds at least `len` elements, was zeroed when allocated, is aligned to 64 bytes,
        // and `Plain` types have no invalid values.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) }
    }
}
