//! Packing of operands into tiles and panels.
use super::panel::Panel;
use crate::element::Element;

/// Packs lanes whose elements lie side by side along the summed axis: `lane(i)[..depth]`.
///
/// `out` is `[steps, width]`; lanes past `lanes` become zero.
pub(crate) fn pack_lanes<'a, P: Panel, T: Element>(
    depth: usize,
    lanes: usize,
    width: usize,
    lane: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    assert!(lanes <= width && out.len() == steps * width);
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
/// `out` is `[steps, width]`; lanes past `lanes` become zero.
pub(crate) fn pack_rows<'a, P: Panel, T: Element>(
    depth: usize,
    lanes: usize,
    width: usize,
    row: impl Fn(usize) -> &'a [T],
    out: &mut [P],
) {
    let steps = depth.div_ceil(P::STEP);
    assert!(lanes <= width && out.len() == steps * width);
    for (step, out) in out.chunks_exact_mut(width).enumerate() {
        let k = step * P::STEP;
        let first = &row(k)[..lanes];
        if P::STEP == 2 && k + 1 < depth {
            let second = &row(k + 1)[..lanes];
            for ((out, a), b) in out.iter_mut().zip(first).zip(second) {
                *out = P::pack(*a, Some(*b));
            }
        } else {
            for (out, a) in out.iter_mut().zip(first) {
                *out = P::pack(*a, None);
            }
        }
        out[lanes..].fill(P::default());
    }
}
