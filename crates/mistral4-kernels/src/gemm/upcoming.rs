//! Memory that later products read, fetched while earlier ones compute.
use crate::scratch::Plain;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Memory that later products read, of which every tile until then fetches a piece.
pub(crate) struct Upcoming<'a> {
    parts: [&'a [u8]; 2],
    piece: usize,
}

impl<'a> Upcoming<'a> {
    pub(crate) fn none() -> Self {
        Self { parts: [&[]; 2], piece: 0 }
    }

    /// Two stretches of memory, fetched while `tiles` tiles are multiplied.
    pub(crate) fn new<T: Plain>(parts: [&'a [T]; 2], tiles: usize) -> Self {
        // SAFETY: plain values have no padding, and bytes no alignment.
        let bytes = |part: &'a [T]| unsafe {
            std::slice::from_raw_parts(part.as_ptr().cast::<u8>(), size_of_val(part))
        };
        let parts = parts.map(bytes);
        let piece = (parts[0].len() + parts[1].len()).div_ceil(tiles.max(1)).next_multiple_of(LINE);
        Self { parts, piece }
    }

    /// What the next tile is to fetch.
    pub(super) fn piece(&mut self) -> &'a [u8] {
        let part = if self.parts[0].is_empty() { &mut self.parts[1] } else { &mut self.parts[0] };
        let (now, later) = part.split_at(self.piece.min(part.len()));
        *part = later;
        now
    }
}

/// Memory that a later tile reads, fetched a line a step: many requests at once would keep this tile's own waiting.
#[cfg(target_arch = "x86_64")]
pub(super) struct Fetch {
    next: *const i8,
    lines: usize,
}

#[cfg(target_arch = "x86_64")]
impl Fetch {
    /// The lines for which there is no step are asked for at once.
    #[inline(always)]
    pub(super) fn new(memory: &[u8], steps: usize) -> Self {
        let lines = memory.len() / LINE;
        let at_once = lines.saturating_sub(steps) * LINE;
        for line in (0..at_once).step_by(LINE) {
            // SAFETY: a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(memory.as_ptr().cast::<i8>().add(line)) };
        }
        Self { next: memory[at_once..].as_ptr().cast(), lines: lines.min(steps) }
    }

    #[inline(always)]
    pub(super) fn line(&mut self) {
        if self.lines > 0 {
            // SAFETY: a prefetch may point anywhere; `next` stays in the memory or just behind it.
            unsafe {
                _mm_prefetch::<_MM_HINT_T1>(self.next);
                self.next = self.next.add(LINE);
            }
            self.lines -= 1;
        }
    }
}
