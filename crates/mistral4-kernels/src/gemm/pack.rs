//! Packing of operands into tiles and panels.
use super::panel::{NR, Panel};
#[cfg(target_arch = "x86_64")]
use super::{pack_avx2, pack_avx512};
use crate::element::Element;
use crate::isa::Isa;

/// Packs lanes whose elements lie side by side along the summed axis: `lane(i)[..depth]`.
///
/// `out` is `[steps, width]`; lanes past `lanes` become zero.
#[inline]
pub(crate) fn pack_lanes<'a, P: Panel, T: Element>(
    isa: Isa,
    depth: usize,
    [lanes, width]: [usize; 2],
    lane: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    assert!(lanes <= width && out.len() == steps * width);
    #[cfg(target_arch = "x86_64")]
    {
        let (lane, out) = (|i: usize| lane(i)[..depth].as_ptr(), out.as_mut_ptr());
        // SAFETY: each lane is cut to `depth`, `out` has been measured, and the processor has the instructions.
        unsafe {
            match isa {
                Isa::Avx512 | Isa::Avx512Bf16 => {
                    let native = isa == Isa::Avx512Bf16;
                    return pack_avx512::pack_lanes(native, [depth, lanes, width], lane, out);
                }
                Isa::Avx2 => return pack_avx2::pack_lanes(depth, lanes, width, lane, out),
                Isa::Portable => {}
            }
        }
    }
    let _ = isa;
    for i in 0..lanes {
        let source = &lane(i)[..depth];
        for (chunk, out) in source.chunks(P::STEP).zip(out.iter_mut().skip(i).step_by(width)) {
            *out = P::pack(chunk[0], chunk.get(1).copied());
        }
    }
    if lanes < width {
        for step in out.chunks_exact_mut(width) {
            step[lanes..].fill(P::default());
        }
    }
}

/// Packs lanes that lie side by side at each position of the summed axis: `row(k)[..lanes]`.
///
/// `out` is `[steps, width]`, or `[panels, steps, NR]` when `width` is more than one panel; lanes past `lanes`
/// become zero.
#[inline]
pub(crate) fn pack_rows<'a, P: Panel, T: Element>(
    isa: Isa,
    depth: usize,
    [lanes, width]: [usize; 2],
    row: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    assert!(lanes <= width && out.len() == steps * width && (width <= NR || width.is_multiple_of(NR)));
    if out.is_empty() {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    {
        let (row, out) = (|k: usize| row(k)[..lanes].as_ptr(), out.as_mut_ptr());
        // SAFETY: each row is cut to `lanes`, `out` has been measured, and the processor has the instructions.
        unsafe {
            match isa {
                Isa::Avx512 | Isa::Avx512Bf16 => {
                    let native = isa == Isa::Avx512Bf16;
                    return pack_avx512::pack_rows(native, [depth, lanes, width], row, out);
                }
                Isa::Avx2 => return pack_avx2::pack_rows(depth, lanes, width, row, out),
                Isa::Portable => {}
            }
        }
    }
    let _ = isa;
    for (panel, out) in out.chunks_exact_mut(steps * width.min(NR)).enumerate() {
        let lanes = (panel * NR).min(lanes)..((panel + 1) * NR).min(lanes);
        for (step, out) in out.chunks_exact_mut(width.min(NR)).enumerate() {
            let k = step * P::STEP;
            let first = &row(k)[lanes.clone()];
            if P::STEP == 2 && k + 1 < depth {
                let second = &row(k + 1)[lanes.clone()];
                for ((out, a), b) in out.iter_mut().zip(first).zip(second) {
                    *out = P::pack(*a, Some(*b));
                }
            } else {
                for (out, a) in out.iter_mut().zip(first) {
                    *out = P::pack(*a, None);
                }
            }
            out[lanes.len()..].fill(P::default());
        }
    }
}
