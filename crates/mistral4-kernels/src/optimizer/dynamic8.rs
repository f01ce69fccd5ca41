//! Numbers in 8 bits by blocks: a code stands for a fraction of its block's largest magnitude.
//!
//! The 256 fractions are 0, 1 and, in each of seven decades from 1e-6 to 1, twice as many evenly spaced ones as in the
//! decade below. Source: Dettmers 2016, "8-Bit Approximations for Parallelism in Deep Learning", and
//! `create_dynamic_map` of bitsandbytes.

use std::hint::black_box;

#[cfg(target_arch = "x86_64")]
use super::dynamic8_avx512;
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::vector::{mul_add, per_isa};

/// Elements that share a largest magnitude.
pub const BLOCK_8BIT: usize = 256;

const DECADES: usize = 7;

/// Which fractions the codes stand for, in rising order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DynamicMap {
    /// 127 negative fractions, 0, and 128 positive ones.
    Signed,
    /// 0 and 255 positive fractions.
    Unsigned,
}

/// Numbers in 8 bits.
#[derive(Debug)]
pub struct Quantized8bit<'a> {
    /// One code a number.
    pub codes: &'a mut [u8],
    /// The largest magnitude of each block of [`BLOCK_8BIT`] numbers.
    pub absmax: &'a mut [f32],
}

impl<'a> Quantized8bit<'a> {
    pub(super) fn check(&self, len: usize) {
        assert_eq!(self.codes.len(), len);
        assert_eq!(self.absmax.len(), len.div_ceil(BLOCK_8BIT));
    }

    pub(super) fn shared(self) -> (Shared<'a, u8>, Shared<'a, f32>) {
        (Shared::new(self.codes), Shared::new(self.absmax))
    }
}

impl DynamicMap {
    /// The fractions of all codes.
    pub fn fractions(self) -> &'static [f32; 256] {
        match self {
            DynamicMap::Signed => &SIGNED_FRACTIONS,
            DynamicMap::Unsigned => &UNSIGNED_FRACTIONS,
        }
    }

    /// The code of 0.
    pub const fn zero(self) -> u8 {
        match self {
            DynamicMap::Signed => 127,
            DynamicMap::Unsigned => 0,
        }
    }

    /// The runs of evenly spaced fractions, in rising order.
    pub(super) fn levels(self) -> &'static [Level; LEVELS] {
        match self {
            DynamicMap::Signed => &SIGNED,
            DynamicMap::Unsigned => &UNSIGNED,
        }
    }

    /// Fractions in a decade, counted from the smallest.
    const fn in_decade(self, decade: usize) -> usize {
        match self {
            DynamicMap::Signed => 1 << decade,
            DynamicMap::Unsigned => 2 << decade,
        }
    }

    /// How many steps above 0 a decade's first fraction lies.
    const fn first(self, decade: usize) -> usize {
        let mut first = 1;
        let mut below = 0;
        while below < decade {
            first += self.in_decade(below);
            below += 1;
        }
        first
    }

    /// The fraction `index` of a decade, in the middle of its share of the decade.
    const fn fraction(self, decade: usize, index: usize) -> f64 {
        DECADE_END[decade] * (0.1 + 0.9 * (index as f64 + 0.5) / self.in_decade(decade) as f64)
    }
}

const DECADE_END: [f64; DECADES] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];

static SIGNED_FRACTIONS: [f32; 256] = fractions(DynamicMap::Signed);
static UNSIGNED_FRACTIONS: [f32; 256] = fractions(DynamicMap::Unsigned);

const fn fractions(map: DynamicMap) -> [f32; 256] {
    let mut fractions = [0.0; 256];
    let zero = map.zero() as usize;
    let mut decade = 0;
    while decade < DECADES {
        let mut index = 0;
        while index < map.in_decade(decade) {
            let fraction = map.fraction(decade, index) as f32;
            let steps = map.first(decade) + index;
            fractions[zero + steps] = fraction;
            if zero >= steps {
                fractions[zero - steps] = -fraction;
            }
            index += 1;
        }
        decade += 1;
    }
    fractions[255] = 1.0;
    fractions
}

/// A run of evenly spaced fractions.
#[derive(Clone, Copy)]
pub(super) struct Level {
    /// Where numbers begin to be nearer to this run than to the one below.
    pub(super) from: f32,
    /// Steps above 0 of the nearest fraction are `slope * x + offset`, rounded down, from `first` to `last`.
    pub(super) slope: f32,
    pub(super) offset: f32,
    pub(super) first: f32,
    pub(super) last: f32,
}

impl Level {
    /// Slope, offset, first and last, as bits: they are exchanged without branches and without rounding.
    #[inline(always)]
    fn bits(&self) -> [u32; 4] {
        [self.slope, self.offset, self.first, self.last].map(f32::to_bits)
    }
}

pub(super) const LEVELS: usize = DECADES + 2;
static SIGNED: [Level; LEVELS] = levels(DynamicMap::Signed);
static UNSIGNED: [Level; LEVELS] = levels(DynamicMap::Unsigned);

const fn levels(map: DynamicMap) -> [Level; LEVELS] {
    let mut levels = [Level { from: 0.0, slope: 0.0, offset: 0.0, first: 0.0, last: 0.0 }; LEVELS];
    let mut below = 0.0;
    let mut decade = 0;
    while decade < DECADES {
        let count = map.in_decade(decade);
        let first = map.first(decade) as f64;
        let slope = count as f64 / (0.9 * DECADE_END[decade]);
        levels[decade + 1] = Level {
            from: ((below + map.fraction(decade, 0)) / 2.0) as f32,
            slope: slope as f32,
            offset: (first - 0.1 * DECADE_END[decade] * slope) as f32,
            first: first as f32,
            last: (first + count as f64 - 1.0) as f32,
        };
        below = map.fraction(decade, count - 1);
        decade += 1;
    }
    let one = map.first(DECADES) as f32;
    levels[LEVELS - 1] =
        Level { from: ((below + 1.0) / 2.0) as f32, slope: 0.0, offset: one, first: one, last: one };
    if matches!(map, DynamicMap::Unsigned) {
        levels[1].from = f32::MIN_POSITIVE;
    }
    levels
}

/// The largest magnitude of a block as it is kept, and its reciprocal.
#[inline(always)]
pub(super) fn scale(absmax: f32) -> (f32, f32) {
    // Below this, the reciprocal would be infinite.
    if absmax < 4.0 * f32::MIN_POSITIVE { (0.0, 0.0) } else { (absmax, 1.0 / absmax) }
}

/// Widens a block's codes; the rest of `to` stays.
pub(super) fn dequantize_block(
    isa: Isa,
    map: DynamicMap,
    codes: &[u8],
    absmax: f32,
    to: &mut [f32; BLOCK_8BIT],
) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: the processor has the instructions.
        return unsafe { dynamic8_avx512::dequantize_block(map, codes, absmax, to) };
    }
    widen(isa, map, codes, absmax, to);
}

per_isa! {
    fn widen(map: DynamicMap, codes: &[u8], absmax: f32, to: &mut [f32; BLOCK_8BIT]) = widen_body;
}

#[allow(clippy::needless_range_loop, reason = "plain loops are vectorised")]
#[inline(always)]
fn widen_body<const FMA: bool>(map: DynamicMap, codes: &[u8], absmax: f32, to: &mut [f32; BLOCK_8BIT]) {
    let fractions = map.fractions();
    for i in 0..codes.len().min(BLOCK_8BIT) {
        to[i] = fractions[codes[i] as usize] * absmax;
    }
}

/// Writes the codes of the first numbers of a block, zeros behind them, and returns their largest magnitude.
///
/// Each number becomes the nearest one that has a code, but a positive number of the unsigned map never becomes 0: a
/// second moment of 0 under a first moment that is not would make a step of any size.
pub(super) fn quantize_block(isa: Isa, map: DynamicMap, from: &[f32; BLOCK_8BIT], codes: &mut [u8]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        // SAFETY: the processor has the instructions.
        return unsafe { dynamic8_avx512::quantize_block(map, from, codes) };
    }
    narrow(isa, map, from, codes)
}

per_isa! {
    fn narrow(map: DynamicMap, from: &[f32; BLOCK_8BIT], codes: &mut [u8]) -> f32 = narrow_body;
}

#[allow(clippy::needless_range_loop, reason = "plain loops are vectorised; closures in iterators are not")]
#[inline(always)]
fn narrow_body<const FMA: bool>(map: DynamicMap, from: &[f32; BLOCK_8BIT], codes: &mut [u8]) -> f32 {
    /// Lanes that are worked on at once.
    const LANES: usize = 16;
    let mut largest = [0.0f32; LANES];
    for part in from.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            largest[i] = if part[i].abs() > largest[i] { part[i].abs() } else { largest[i] };
        }
    }
    let absmax = largest.iter().fold(0.0f32, |a, &b| a.max(b));
    let (absmax, inverse) = scale(absmax);
    // What the compiler knows of the levels it turns into branches, lane by lane.
    let levels = black_box(map.levels());
    let mut all = [0u8; BLOCK_8BIT];
    for (part, codes) in from.as_chunks::<LANES>().0.iter().zip(all.as_chunks_mut::<LANES>().0) {
        let mut x = [0.0f32; LANES];
        for i in 0..LANES {
            x[i] = part[i].abs() * inverse;
        }
        // Each lane takes the constants of the highest level that it reaches.
        let mut bits = levels[0].bits().map(|bits| [bits; LANES]);
        for pair in levels.windows(2) {
            let (below, level) = (pair[0].bits(), pair[1].bits());
            let mut reached = [0u32; LANES];
            for i in 0..LANES {
                reached[i] = if x[i] >= pair[1].from { u32::MAX } else { 0 };
            }
            for (bits, (below, level)) in bits.iter_mut().zip(below.into_iter().zip(level)) {
                for i in 0..LANES {
                    bits[i] ^= reached[i] & (below ^ level);
                }
            }
        }
        let [slope, offset, first, last] = bits.map(|bits| bits.map(f32::from_bits));
        for i in 0..LANES {
            let steps = mul_add::<FMA>(x[i], slope[i], offset[i]);
            let steps = if steps < first[i] { first[i] } else { steps };
            let steps = if steps > last[i] { last[i] } else { steps } as i32;
            codes[i] = match map {
                DynamicMap::Unsigned => steps,
                DynamicMap::Signed => 127 + if part[i] < 0.0 { -steps.min(127) } else { steps },
            } as u8;
        }
    }
    codes.copy_from_slice(&all[..codes.len()]);
    absmax
}
