//! Choosing codes, and laying out codes that are given.
use super::LANES;
use super::matrix::{Bits, QuantizedMatrix, Scales, Scheme, StackDims, Tile};
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::per_isa;
use half::bf16;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why values cannot be quantised, or codes not be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    /// A value, or an FP8 code, is not finite.
    #[error("the value at [{matrix}, {row}, {column}] is not finite")]
    NotFinite {
        /// Matrix of the stack.
        matrix: usize,
        /// Row.
        row: usize,
        /// Column.
        column: usize,
    },
    /// No kernel takes this group size.
    #[error("groups of {group_size} columns are not supported; use 32, 64, 128 or 256")]
    GroupSize {
        /// The size asked for.
        group_size: usize,
    },
    /// No kernel takes this block size.
    #[error(
        "FP8 scales for {block} columns of {columns} are not supported; use a multiple of 4, or all columns"
    )]
    Block {
        /// The size asked for.
        block: usize,
        /// Columns of the matrix.
        columns: usize,
    },
    /// An array has the wrong length.
    #[error("{name} has {got} entries, expected {expected}")]
    Length {
        /// Name of the array.
        name: &'static str,
        /// Entries it has.
        got: usize,
        /// Entries it should have.
        expected: usize,
    },
    /// A code does not fit its width.
    #[error("code {code} at entry {index} of {name} does not fit {bits} bits")]
    Code {
        /// Name of the array.
        name: &'static str,
        /// Where it stands.
        index: usize,
        /// The code.
        code: u8,
        /// The width.
        bits: usize,
    },
}

/// Row-major codes with their scales.
struct Parts<'a> {
    codes: &'a [u8],
    /// `[matrices, rows, groups]`.
    scales: Scales,
    zeros: Vec<u8>,
}

impl QuantizedMatrix {
    /// Quantises values: each group's scale is the one of least squared error among some near the full range.
    ///
    /// For FP8, each matrix gets the scale that maps its largest magnitude to that of the format.
    ///
    /// # Shapes
    /// `values`: `[matrices, rows, columns]`.
    ///
    /// # Errors
    /// A value that is not finite, or a group size that no kernel takes.
    pub fn quantize<T: Element>(
        dims: StackDims,
        scheme: Scheme,
        values: &[T],
    ) -> Result<Self, QuantizeError> {
        check_scheme(dims, scheme)?;
        length("values", values.len(), dims.elements())?;
        match scheme {
            Scheme::Int { bits, group_size, symmetric } => {
                Self::quantize_int(dims, (bits, group_size, symmetric), values)
            }
            Scheme::Fp8 { .. } => Self::quantize_fp8(dims, values),
        }
    }

    fn quantize_int<T: Element>(
        dims: StackDims,
        (bits, group_size, symmetric): (Bits, usize, bool),
        values: &[T],
    ) -> Result<Self, QuantizeError> {
        let StackDims { rows, columns, .. } = dims;
        let groups = columns.div_ceil(group_size);
        let count = dims.matrices * rows * groups;
        let (mut codes, mut scales, mut zeros) =
            (vec![0u8; values.len()], vec![bf16::ZERO; count], vec![bits.middle(); count]);
        let bad = AtomicUsize::new(usize::MAX);
        let isa = Isa::active();
        let shared = (Shared::new(&mut codes), Shared::new(&mut scales), Shared::new(&mut zeros));
        parallel::for_each_chunk(dims.matrices * rows, 64, |range| {
            for row in range {
                let values = &values[row * columns..(row + 1) * columns];
                // SAFETY: each task owns its rows.
                let (codes, scales, zeros) = unsafe {
                    (
                        shared.0.slice(row * columns..(row + 1) * columns),
                        shared.1.slice(row * groups..(row + 1) * groups),
                        shared.2.slice(row * groups..(row + 1) * groups),
                    )
                };
                let parts = values.chunks(group_size).zip(codes.chunks_mut(group_size));
                for ((values, codes), (scale, zero)) in parts.zip(scales.iter_mut().zip(zeros)) {
                    match quantize_group(isa, bits, symmetric, values, codes) {
                        Some(chosen) => (*scale, *zero) = chosen,
                        None => {
                            bad.fetch_min(row, Ordering::Relaxed);
                        }
                    }
                }
            }
        });
        not_finite(dims, values, bad.into_inner())?;
        let scheme = Scheme::Int { bits, group_size, symmetric };
        let zeros = if symmetric { Vec::new() } else { zeros };
        Ok(Self::arrange(dims, scheme, &Parts { codes: &codes, scales: Scales::Bf16(scales), zeros }))
    }

    fn quantize_fp8<T: Element>(dims: StackDims, values: &[T]) -> Result<Self, QuantizeError> {
        let per_matrix = dims.rows * dims.columns;
        if let Some(at) = values.iter().position(|v| !v.to_f32().is_finite()) {
            not_finite(dims, values, at / dims.columns)?;
        }
        let mut scales = vec![1.0f32; dims.matrices];
        let mut codes = vec![0u8; values.len()];
        let shared = (Shared::new(&mut codes), Shared::new(&mut scales));
        parallel::for_each(dims.matrices, |matrix| {
            let range = matrix * per_matrix..(matrix + 1) * per_matrix;
            // SAFETY: each task owns its matrix.
            let (codes, scale) =
                unsafe { (shared.0.slice(range.clone()), &mut shared.1.slice(matrix..matrix + 1)[0]) };
            let largest = values[range.clone()].iter().fold(0.0f32, |m, v| m.max(v.to_f32().abs()));
            if largest > 0.0 {
                *scale = (largest / E4M3_MAX).max(f32::MIN_POSITIVE);
            }
            for (code, value) in codes.iter_mut().zip(&values[range]) {
                *code = encode_e4m3(value.to_f32() / *scale);
            }
        });
        let of_rows = scales.iter().flat_map(|scale| std::iter::repeat_n(*scale, dims.rows)).collect();
        let scheme = Scheme::Fp8 { block: dims.columns.max(1) };
        Ok(Self::arrange(
            dims,
            scheme,
            &Parts { codes: &codes, scales: Scales::F32(of_rows), zeros: Vec::new() },
        ))
    }

    /// Takes codes with their scales.
    ///
    /// # Shapes
    /// `codes`: `[matrices, rows, columns]`, integers without a sign; `scales`: `[matrices, rows, groups]`; `zeros`: as
    /// `scales`, or empty if symmetric or FP8.
    ///
    /// # Errors
    /// Arrays of the wrong length, codes that are too wide or not a number, or a group size that no kernel takes.
    pub fn from_codes(
        dims: StackDims,
        scheme: Scheme,
        codes: &[u8],
        scales: Scales,
        zeros: Vec<u8>,
    ) -> Result<Self, QuantizeError> {
        check_scheme(dims, scheme)?;
        length("codes", codes.len(), dims.elements())?;
        let count = dims.matrices * dims.rows * dims.columns.div_ceil(scheme.group());
        length("scales", scales.len(), count)?;
        let symmetric = !matches!(scheme, Scheme::Int { symmetric: false, .. });
        length("zeros", zeros.len(), if symmetric { 0 } else { count })?;
        if let Scheme::Int { bits, .. } = scheme {
            for (name, codes) in [("codes", codes), ("zeros", &zeros)] {
                if let Some(index) = codes.iter().position(|code| *code > bits.largest()) {
                    let bits = bits.count();
                    return Err(QuantizeError::Code { name, index, code: codes[index], bits });
                }
            }
        } else if let Some(at) = codes.iter().position(|code| code & 0x7f == 0x7f) {
            let (row, column) = (at / dims.columns, at % dims.columns);
            return Err(QuantizeError::NotFinite { matrix: row / dims.rows, row: row % dims.rows, column });
        }
        Ok(Self::arrange(dims, scheme, &Parts { codes, scales, zeros }))
    }

    /// Lays checked codes out in panels.
    fn arrange(dims: StackDims, scheme: Scheme, parts: &Parts<'_>) -> Self {
        let StackDims { matrices, rows, columns } = dims;
        let (panels, groups) = (rows.div_ceil(LANES), columns.div_ceil(scheme.group()));
        let width = scheme.tile_columns();
        let tiles = columns.div_ceil(width);
        let mut codes = vec![Tile([0; 64]); matrices * panels * tiles];
        let mut scales = parts.scales.zeros_like(matrices * panels * groups * LANES);
        let mut zeros = vec![0; if parts.zeros.is_empty() { 0 } else { scales.len() }];
        for matrix in 0..matrices {
            for row in 0..rows {
                let (panel, lane) = (matrix * panels + row / LANES, row % LANES);
                for group in 0..groups {
                    let (to, from) =
                        ((panel * groups + group) * LANES + lane, (matrix * rows + row) * groups + group);
                    scales.copy(to, &parts.scales, from);
                    if !zeros.is_empty() {
                        zeros[to] = parts.zeros[from];
                    }
                }
            }
        }
        let shared = Shared::new(&mut codes);
        parallel::for_each(matrices * panels, |panel| {
            // SAFETY: each task owns the tiles of its panel.
            let out = unsafe { shared.slice(panel * tiles..(panel + 1) * tiles) };
            let (matrix, first) = (panel / panels, panel % panels * LANES);
            for lane in 0..LANES.min(rows - first) {
                let row = &parts.codes[(matrix * rows + first + lane) * columns..][..columns];
                for (tile, codes) in out.iter_mut().zip(row.chunks(width)) {
                    for (column, code) in codes.iter().enumerate() {
                        tile.0[lane * 4 + column % 4] |= code << (4 * (column / 4));
                    }
                }
            }
        });
        QuantizedMatrix { dims, scheme, codes, scales, zeros }
    }
}

fn check_scheme(dims: StackDims, scheme: Scheme) -> Result<(), QuantizeError> {
    match scheme {
        Scheme::Int { group_size, .. } if ![32, 64, 128, 256].contains(&group_size) => {
            Err(QuantizeError::GroupSize { group_size })
        }
        Scheme::Fp8 { block } if block == 0 || (block < dims.columns && !block.is_multiple_of(4)) => {
            Err(QuantizeError::Block { block, columns: dims.columns })
        }
        _ => Ok(()),
    }
}

fn length(name: &'static str, got: usize, expected: usize) -> Result<(), QuantizeError> {
    if got == expected { Ok(()) } else { Err(QuantizeError::Length { name, got, expected }) }
}

/// Names the first value of a row that is not finite.
fn not_finite<T: Element>(dims: StackDims, values: &[T], row: usize) -> Result<(), QuantizeError> {
    if row == usize::MAX {
        return Ok(());
    }
    let values = &values[row * dims.columns..(row + 1) * dims.columns];
    let column = values.iter().position(|v| !v.to_f32().is_finite()).unwrap_or(0);
    Err(QuantizeError::NotFinite { matrix: row / dims.rows, row: row % dims.rows, column })
}

per_isa! {
    /// Chooses scale and zero point of a group and writes its codes; `None` when a value is not finite.
    fn quantize_group<T: Element>(bits: Bits, symmetric: bool, values: &[T], codes: &mut [u8])
        -> Option<(bf16, u8)> = quantize_group_body;
}

#[inline(always)]
fn quantize_group_body<T: Element, const FMA: bool>(
    bits: Bits,
    symmetric: bool,
    values: &[T],
    codes: &mut [u8],
) -> Option<(bf16, u8)> {
    // Ranges tried, as shares of the full one: cutting off the largest values can make all others finer.
    // At 7/8 the largest magnitude takes code 0 where it is negative.
    const SHARES: [f32; 8] = [1.0, 0.97, 0.935, 0.905, 0.875, 0.84, 0.80, 0.75];
    let mut wide = [0.0f32; 256];
    let wide = &mut wide[..values.len()];
    let (mut low, mut high, mut finite) = (0.0f32, 0.0f32, true);
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.to_f32();
        low = low.min(*wide);
        high = high.max(*wide);
        finite &= wide.is_finite();
    }
    if !finite {
        return None;
    }
    let (middle, largest) = (f32::from(bits.middle()), f32::from(bits.largest()));
    let full = if symmetric { low.abs().max(high) / (middle - 1.0) } else { (high - low) / largest };
    let shares = if bits == Bits::Four { &SHARES[..] } else { &SHARES[..1] };
    let (mut best, mut least) = ((0.0f32, middle), f32::INFINITY);
    for share in shares {
        let scale = bf16::from_f32(full * share);
        let scale = Element::to_f32(scale);
        if scale < f32::MIN_POSITIVE || !scale.is_finite() {
            continue;
        }
        let zero = if symmetric { middle } else { round(-low / scale).clamp(0.0, largest) };
        let inverse = 1.0 / scale;
        let mut error = 0.0f32;
        for value in wide.iter() {
            let code = (round(value * inverse) + zero).clamp(0.0, largest);
            let difference = (code - zero) * scale - value;
            error += difference * difference;
        }
        if error < least {
            (best, least) = ((scale, zero), error);
        }
    }
    let (scale, zero) = best;
    // All zeros, or too small for any scale.
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(wide.iter()) {
        *code = (round(value * inverse) + zero).clamp(0.0, largest) as u8;
    }
    Some((bf16::from_f32(scale), zero as u8))
}

/// Rounds to nearest, ties to even; for magnitudes below 2^22.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23
    (x.clamp(-4e6, 4e6) + SHIFT) - SHIFT
}

const E4M3_MAX: f32 = 448.0;

/// Rounds to the nearest e4m3 value, ties to even, and saturates.
fn encode_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    // 2^-120 of the value has the format's exponent in an f32's bits, and its rounding position at bit 20.
    const SCALE: f32 = f32::from_bits((127 - 120) << 23);
    let bits = (value.abs().min(E4M3_MAX) * SCALE).to_bits();
    let rounded = (bits + 0x7_ffff + ((bits >> 20) & 1)) >> 20;
    sign | rounded as u8
}

#[cfg(test)]
mod tests {
    use super::super::matrix::e4m3;
    use super::*;

    #[test]
    fn e4m3_codes_survive_encoding() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode_e4m3(e4m3(u32::from(code))), code);
        }
        // Ties go to the even code, and large values saturate.
        assert_eq!(encode_e4m3(1.0625), encode_e4m3(1.0));
        assert_eq!(encode_e4m3(1.1875), encode_e4m3(1.25));
        assert_eq!(encode_e4m3(1e9), 0x7e);
        assert_eq!(e4m3(0x7e), 448.0);
        assert_eq!(e4m3(0x01), 2.0f32.powi(-9));
    }
}
