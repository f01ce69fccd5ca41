//! A stack of quantised matrices, laid out in panels of 16 rows.
use super::LANES;
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::per_isa;
use half::bf16;
use std::ops::Range;

/// Width of an integer code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// 4 bits.
    Four,
    /// 8 bits.
    Eight,
}

impl Bits {
    /// The width as a number.
    pub fn count(self) -> usize {
        match self {
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// The code that stands for 0 in symmetric quantisation: codes are stored without a sign.
    pub fn middle(self) -> u8 {
        match self {
            Bits::Four => 8,
            Bits::Eight => 128,
        }
    }

    /// The largest code.
    pub fn largest(self) -> u8 {
        match self {
            Bits::Four => 15,
            Bits::Eight => 255,
        }
    }
}

/// How values are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// `scale * (code - zero)`, with a scale and a zero point for each row and group of columns.
    Int {
        /// Width of a code.
        bits: Bits,
        /// Neighbouring columns that share a scale: 32, 64, 128 or 256.
        group_size: usize,
        /// Whether every zero point is the middle code.
        symmetric: bool,
    },
    /// `scale * e4m3(code)`, with a scale for each row and block of columns.
    Fp8 {
        /// Neighbouring columns that share a scale, a multiple of 4, or all columns.
        block: usize,
    },
}

impl Scheme {
    /// Columns in a tile of 64 bytes.
    pub(crate) fn tile_columns(self) -> usize {
        match self {
            Scheme::Int { bits: Bits::Four, .. } => 8,
            _ => 4,
        }
    }

    /// Columns that share a scale.
    pub fn group(self) -> usize {
        match self {
            Scheme::Int { group_size, .. } => group_size,
            Scheme::Fp8 { block } => block,
        }
    }
}

/// Sizes of a stack of matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackDims {
    /// Matrices.
    pub matrices: usize,
    /// Rows of each: outputs.
    pub rows: usize,
    /// Columns of each: inputs.
    pub columns: usize,
}

impl StackDims {
    /// Elements of the stack.
    pub fn elements(self) -> usize {
        self.matrices * self.rows * self.columns
    }
}

/// Codes of 16 rows and 4 columns (8 for 4-bit codes): the 32-bit word of a row holds one byte a column. Of 4-bit
/// codes, the low halves are the first four columns and the high halves the next four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [u8; 64]);

impl Tile {
    /// The four codes of a row, one a byte; for 4-bit codes, eight halves.
    #[inline(always)]
    pub(crate) fn word(&self, row: usize) -> u32 {
        let at = row * 4;
        u32::from_le_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }
}

/// Scales, in the precision they were given in.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// 32-bit floats.
    F32(Vec<f32>),
}

impl Scales {
    pub(crate) fn get(&self, index: usize) -> f32 {
        match self {
            Scales::Bf16(scales) => Element::to_f32(scales[index]),
            Scales::F32(scales) => scales[index],
        }
    }

    /// Number of scales.
    pub fn len(&self) -> usize {
        match self {
            Scales::Bf16(scales) => scales.len(),
            Scales::F32(scales) => scales.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An array of zeros in the same precision.
    pub(crate) fn zeros_like(&self, len: usize) -> Scales {
        match self {
            Scales::Bf16(_) => Scales::Bf16(vec![bf16::ZERO; len]),
            Scales::F32(_) => Scales::F32(vec![0.0; len]),
        }
    }

    /// Copies one scale of `from`, which has the same precision.
    pub(crate) fn copy(&mut self, index: usize, from: &Scales, at: usize) {
        match (self, from) {
            (Scales::Bf16(to), Scales::Bf16(from)) => to[index] = from[at],
            (Scales::F32(to), Scales::F32(from)) => to[index] = from[at],
            _ => unreachable!("scales of one precision"),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Scales::Bf16(scales) => size_of_val(&scales[..]),
            Scales::F32(scales) => size_of_val(&scales[..]),
        }
    }

    #[inline(always)]
    fn lanes(&self, first: usize) -> [f32; LANES] {
        match self {
            Scales::Bf16(scales) => {
                let lanes = &scales[first..first + LANES];
                std::array::from_fn(|i| Element::to_f32(lanes[i]))
            }
            Scales::F32(scales) => {
                let lanes = &scales[first..first + LANES];
                std::array::from_fn(|i| lanes[i])
            }
        }
    }
}

/// A stack of quantised matrices, `[matrices, rows, columns]`.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedMatrix {
    pub(crate) dims: StackDims,
    pub(crate) scheme: Scheme,
    /// `[matrices, panels, tiles]`, a panel being 16 rows.
    pub(crate) codes: Vec<Tile>,
    /// `[matrices, panels, groups, 16]`; 0 for rows past the last.
    pub(crate) scales: Scales,
    /// As `scales`; empty unless asymmetric.
    pub(crate) zeros: Vec<u8>,
}

impl QuantizedMatrix {
    /// Sizes.
    pub fn dims(&self) -> StackDims {
        self.dims
    }

    /// How values are coded.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Bytes of codes, scales and zero points.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.codes[..]) + self.scales.bytes() + self.zeros.len()
    }

    /// Whether scales are bf16 (else f32).
    pub fn has_bf16_scales(&self) -> bool {
        matches!(self.scales, Scales::Bf16(_))
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.dims.columns.div_ceil(self.scheme.group().max(1))
    }

    /// Whether there are zero points.
    pub(crate) fn has_zeros(&self) -> bool {
        matches!(self.scheme, Scheme::Int { symmetric: false, .. })
    }

    pub(crate) fn panels(&self) -> usize {
        self.dims.rows.div_ceil(LANES)
    }

    /// Tiles of a panel.
    pub(crate) fn tiles(&self) -> usize {
        self.dims.columns.div_ceil(self.scheme.tile_columns())
    }

    /// Bytes of a panel with its scales, for balancing work.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.bytes().checked_div(self.dims.matrices * self.panels()).unwrap_or(0)
    }

    pub(crate) fn panel(&self, matrix: usize, panel: usize) -> Panel<'_> {
        let index = matrix * self.panels() + panel;
        let tiles = self.tiles();
        Panel { stack: self, tiles: &self.codes[index * tiles..(index + 1) * tiles], index }
    }

    fn group_lane(&self, matrix: usize, row: usize, group: usize) -> usize {
        ((matrix * self.panels() + row / LANES) * self.groups() + group) * LANES + row % LANES
    }

    /// The code of an element; integer codes have no sign.
    pub fn code(&self, matrix: usize, row: usize, column: usize) -> u8 {
        let columns = self.scheme.tile_columns();
        let word = self.panel(matrix, row / LANES).tiles[column / columns].word(row % LANES);
        let column = column % columns;
        let byte = (word >> (8 * (column % 4))) as u8;
        match self.scheme {
            Scheme::Int { bits: Bits::Four, .. } => (byte >> (4 * (column / 4))) & 15,
            _ => byte,
        }
    }

    /// The scale of a row's group.
    pub fn scale(&self, matrix: usize, row: usize, group: usize) -> f32 {
        self.scales.get(self.group_lane(matrix, row, group))
    }

    /// The zero point of a row's group; 0 for FP8.
    pub fn zero(&self, matrix: usize, row: usize, group: usize) -> u8 {
        match self.scheme {
            Scheme::Int { symmetric: false, .. } => self.zeros[self.group_lane(matrix, row, group)],
            Scheme::Int { bits, .. } => bits.middle(),
            Scheme::Fp8 { .. } => 0,
        }
    }

    /// The value of an element.
    pub fn value(&self, matrix: usize, row: usize, column: usize) -> f32 {
        let group = column / self.scheme.group();
        let (code, scale) = (self.code(matrix, row, column), self.scale(matrix, row, group));
        match self.scheme {
            Scheme::Int { .. } => {
                let zero = i32::from(self.zero(matrix, row, group));
                scale * (i32::from(code) - zero) as f32
            }
            Scheme::Fp8 { .. } => e4m3(u32::from(code)) * scale,
        }
    }

    /// The values of one matrix, rounded once.
    ///
    /// # Shapes
    /// `out`: `[rows, columns]`.
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn dequantize<T: Element>(&self, matrix: usize, out: &mut [T]) {
        let StackDims { rows, columns, .. } = self.dims;
        assert_eq!(out.len(), rows * columns, "out is [rows, columns]");
        let isa = Isa::active();
        let out = Shared::new(out);
        parallel::for_each(self.panels(), |panel| {
            let range = panel * LANES..((panel + 1) * LANES).min(rows);
            // SAFETY: each task owns the rows of its panel.
            let out = unsafe { out.slice(range.start * columns..range.end * columns) };
            rows_of_panel(isa, self.panel(matrix, panel), 0..columns, out);
        });
    }

    /// The values of some columns of one matrix, rounded once; the first column begins a tile.
    ///
    /// # Shapes
    /// `out`: `[rows, columns]`.
    pub(crate) fn dequantize_columns<T: Element>(&self, matrix: usize, columns: Range<usize>, out: &mut [T]) {
        assert!(columns.start.is_multiple_of(self.scheme.tile_columns()) && columns.end <= self.dims.columns);
        assert_eq!(out.len(), self.dims.rows * columns.len(), "out is [rows, columns]");
        let isa = Isa::active();
        for (panel, out) in out.chunks_mut((LANES * columns.len()).max(1)).enumerate() {
            rows_of_panel(isa, self.panel(matrix, panel), columns.clone(), out);
        }
    }
}

/// Sixteen rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) stack: &'a QuantizedMatrix,
    pub(crate) tiles: &'a [Tile],
    /// Counted over all matrices.
    pub(crate) index: usize,
}

/// Columns that are made floats at once.
pub(crate) const CHUNK: usize = 32;

/// Values of some columns of a panel: `[columns][16 rows]`.
pub(crate) type Block = [[f32; LANES]; CHUNK];

impl Panel<'_> {
    /// The first scale (and zero point) of a group.
    pub(crate) fn group_start(&self, group: usize) -> usize {
        (self.index * self.stack.groups() + group) * LANES
    }

    /// Makes floats of columns that lie in one group and begin at a tile.
    #[inline(always)]
    pub(crate) fn block(&self, columns: Range<usize>, out: &mut Block) {
        let scheme = self.stack.scheme;
        let width = scheme.tile_columns();
        let lanes = self.group_start(columns.start / scheme.group());
        let scale = self.stack.scales.lanes(lanes);
        let tiles = &self.tiles[columns.start / width..columns.end.div_ceil(width)];
        match scheme {
            Scheme::Int { bits, symmetric, .. } => {
                let zero: [i32; LANES] = if symmetric {
                    [i32::from(bits.middle()); LANES]
                } else {
                    let zeros = &self.stack.zeros[lanes..lanes + LANES];
                    std::array::from_fn(|i| i32::from(zeros[i]))
                };
                let mask = u32::from(bits.largest());
                for (tile, out) in tiles.iter().zip(out.chunks_mut(width)) {
                    for (column, out) in out.iter_mut().enumerate() {
                        let shift = 8 * (column % 4) + 4 * (column / 4);
                        for i in 0..LANES {
                            let code = ((tile.word(i) >> shift) & mask) as i32;
                            out[i] = (code - zero[i]) as f32 * scale[i];
                        }
                    }
                }
            }
            Scheme::Fp8 { .. } => {
                for (tile, out) in tiles.iter().zip(out.chunks_mut(width)) {
                    for (column, out) in out.iter_mut().enumerate() {
                        for i in 0..LANES {
                            out[i] = e4m3((tile.word(i) >> (8 * column)) & 255) * scale[i];
                        }
                    }
                }
            }
        }
    }
}

/// Pieces of some columns that [`Panel::block`] takes.
#[inline(always)]
pub(crate) fn blocks(columns: Range<usize>, group: usize) -> impl Iterator<Item = Range<usize>> {
    let mut next = columns.start;
    std::iter::from_fn(move || {
        let start = next;
        let group_end = (start / group.max(1) + 1).saturating_mul(group);
        next = (start + CHUNK).min(group_end).min(columns.end);
        (start < columns.end).then_some(start..next)
    })
}

/// The value of an e4m3 code: 1 sign, 4 exponent (bias 7) and 3 mantissa bits.
#[inline(always)]
pub(crate) fn e4m3(code: u32) -> f32 {
    // As an f32 with the same exponent bits the value is 2^-120 of what it stands for, subnormal numbers too.
    const BIAS: f32 = f32::from_bits((127 + 120) << 23);
    f32::from_bits(((code & 0x80) << 24) | ((code & 0x7f) << 20)) * BIAS
}

per_isa! {
    /// Writes some columns of the rows of a panel, one row after the other.
    fn rows_of_panel<T: Element>(panel: Panel<'_>, columns: Range<usize>, out: &mut [T]) = rows_of_panel_body;
}

#[inline(always)]
fn rows_of_panel_body<T: Element, const FMA: bool>(panel: Panel<'_>, columns: Range<usize>, out: &mut [T]) {
    let mut block = [[0.0; LANES]; CHUNK];
    for range in blocks(columns.clone(), panel.stack.scheme.group()) {
        panel.block(range.clone(), &mut block);
        let range = range.start - columns.start..range.end - columns.start;
        for (row, out) in out.chunks_exact_mut(columns.len()).enumerate() {
            for (out, values) in out[range.clone()].iter_mut().zip(&block) {
                *out = T::from_f32(values[row]);
            }
        }
    }
}
