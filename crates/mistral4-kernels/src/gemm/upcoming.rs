//! Memory that later products read, fetched while earlier ones compute.
use crate::scratch::Plain;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Rows of memory that begin at equal distances. It is only ever asked for, never read.
#[derive(Clone, Copy)]
pub(crate) struct Stretch {
    first: *const u8,
    rows: usize,
    /// Lines of a row.
    width: usize,
    /// Bytes from row to row.
    stride: usize,
}

impl Stretch {
    /// No memory.
    pub(crate) const NONE: Self = Self { first: std::ptr::null(), rows: 0, width: 1, stride: 0 };

    /// All of a slice.
    pub(crate) fn all<T: Plain>(values: &[T]) -> Self {
        Self::rows(values, [1, values.len(), values.len()])
    }

    /// So many rows of `width` values, `stride` values apart.
    pub(crate) fn rows<T: Plain>(values: &[T], shape: [usize; 3]) -> Self {
        Self::at(values.as_ptr(), shape)
    }

    /// As [`Stretch::rows`], from an address on.
    pub(crate) fn at<T: Plain>(first: *const T, [rows, width, stride]: [usize; 3]) -> Self {
        let width = (width * size_of::<T>()).div_ceil(LINE).max(1);
        Self { first: first.cast(), rows, width, stride: stride * size_of::<T>() }
    }

    fn lines(&self) -> usize {
        self.rows * self.width
    }
}

/// Most stretches that are fetched together: a weight, its rounded copy, and two moments.
const PARTS: usize = 4;

/// Memory that later products read, of which every tile until then fetches a piece.
pub(crate) struct Upcoming {
    parts: [Stretch; PARTS],
    /// The part that is being fetched.
    part: usize,
    /// The next line of it.
    row: usize,
    column: usize,
    /// Lines of a piece.
    piece: usize,
}

impl Upcoming {
    pub(crate) fn none() -> Self {
        Self::new(&[], 1)
    }

    /// Some stretches of memory, fetched while `tiles` tiles are multiplied.
    pub(crate) fn new(memory: &[Stretch], tiles: usize) -> Self {
        let mut parts = [Stretch::NONE; PARTS];
        parts[..memory.len()].copy_from_slice(memory);
        let lines: usize = memory.iter().map(Stretch::lines).sum();
        // A piece lies in one part, so that the last one of each part is short.
        let more = memory.iter().filter(|part| part.lines() > 0).count().saturating_sub(1);
        let piece = lines.div_ceil(tiles.saturating_sub(more).max(1));
        Self { parts, part: 0, row: 0, column: 0, piece }
    }

    /// What the next tile is to fetch.
    pub(crate) fn piece(&mut self) -> Piece {
        if self.piece == 0 {
            return Piece::NONE;
        }
        while self.part + 1 < PARTS && self.row == self.parts[self.part].rows {
            self.part += 1;
            self.row = 0;
        }
        let Stretch { first, rows, width, stride } = self.parts[self.part];
        let (row, column) = (self.row, self.column);
        let lines = self.piece.min((rows - row) * width - column);
        self.column += lines;
        while self.column >= width {
            self.column -= width;
            self.row += 1;
        }
        Piece {
            next: first.wrapping_add(row * stride + column * LINE),
            lines,
            left: width - column,
            width,
            jump: stride.wrapping_sub(width * LINE),
        }
    }
}

/// Some lines of a [`Stretch`].
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    next: *const u8,
    lines: usize,
    /// Lines left in this row.
    left: usize,
    width: usize,
    /// Bytes from the end of a row to the next one.
    jump: usize,
}

impl Piece {
    /// No lines.
    pub(crate) const NONE: Self = Self { next: std::ptr::null(), lines: 0, left: 1, width: 1, jump: 0 };

    /// Asks for all lines at once.
    pub(crate) fn fetch(self) {
        #[cfg(target_arch = "x86_64")]
        Fetch::new(self, 0);
    }
}

/// Memory that a later tile reads, fetched a line a step: many requests at once would keep this tile's own waiting.
#[cfg(target_arch = "x86_64")]
pub(super) struct Fetch {
    next: *const u8,
    /// Lines until the row or the piece ends.
    left: usize,
    /// What follows then.
    rest: Piece,
}

#[cfg(target_arch = "x86_64")]
impl Fetch {
    /// The lines for which there is no step are asked for at once.
    #[inline(always)]
    pub(super) fn new(piece: Piece, steps: usize) -> Self {
        let left = piece.left.min(piece.lines);
        let rest = Piece { lines: piece.lines - left, ..piece };
        let mut fetch = Self { next: piece.next, left, rest };
        for _ in steps..piece.lines {
            fetch.line();
        }
        fetch
    }

    #[inline(always)]
    pub(super) fn line(&mut self) {
        if self.left > 0 {
            // SAFETY: a prefetch may point anywhere.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) };
            self.advance();
        }
    }

    #[inline(always)]
    fn advance(&mut self) {
        self.next = self.next.wrapping_add(LINE);
        self.left -= 1;
        if self.left == 0 {
            self.turn();
        }
    }

    /// Goes to the next row.
    #[cold]
    fn turn(&mut self) {
        self.next = self.next.wrapping_add(self.rest.jump);
        self.left = self.rest.width.min(self.rest.lines);
        self.rest.lines -= self.left;
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    fn addresses(part: &Stretch) -> Vec<usize> {
        let line = |row: usize, column: usize| part.first.addr() + row * part.stride + column * LINE;
        (0..part.rows).flat_map(|row| (0..part.width).map(move |column| line(row, column))).collect()
    }

    #[test]
    fn every_line_is_asked_for_once_and_in_order() {
        let part = |first: usize, [rows, width, stride]: [usize; 3]| Stretch {
            first: std::ptr::without_provenance(first),
            rows,
            width,
            stride: stride * LINE,
        };
        let shapes = [[0, 1, 0], [1, 7, 7], [5, 1, 3], [16, 16, 32], [3, 4, 4]];
        let two =
            shapes.iter().flat_map(|a| shapes.iter().map(|b| vec![part(1 << 20, *a), part(1 << 30, *b)]));
        let four = (0..PARTS).map(|i| part((i + 1) << 20, shapes[i + 1])).collect();
        for parts in two.chain([four]) {
            for tiles in [4, 5, 10, 1000] {
                let mut upcoming = Upcoming::new(&parts, tiles);
                let mut got = Vec::new();
                for _ in 0..tiles {
                    let mut fetch = Fetch::new(upcoming.piece(), usize::MAX);
                    while fetch.left > 0 {
                        got.push(fetch.next.addr());
                        fetch.advance();
                    }
                }
                assert_eq!(got, parts.iter().flat_map(addresses).collect::<Vec<_>>());
            }
        }
    }
}
