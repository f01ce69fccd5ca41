//! Sums of two slices, as on the residual stream.
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::per_isa;

/// Elements of one task.
const PART: usize = 32 << 10;

/// `out = a + b`.
///
/// # Shapes
/// All of the same length.
pub fn add<T: Element>(a: &[T], b: &[T], out: &mut [T]) {
    assert!(a.len() == b.len() && b.len() == out.len(), "a, b and out have one length");
    let isa = Isa::active();
    let (len, out) = (out.len(), Shared::new(out));
    parallel::for_each_chunk(len, PART, |part| {
        // SAFETY: each task owns its part.
        let out = unsafe { out.slice(part.clone()) };
        sum(isa, &a[part.clone()], &b[part], out);
    });
}

per_isa! {
    fn sum<T: Element>(a: &[T], b: &[T], out: &mut [T]) = sum_body;
}

#[inline(always)]
fn sum_body<T: Element, const FMA: bool>(a: &[T], b: &[T], out: &mut [T]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = T::from_f32(a.to_f32() + b.to_f32());
    }
}
