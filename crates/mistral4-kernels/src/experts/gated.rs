//! The gated activation on its own, for dense feed-forwards.
use super::Activation;
use super::backward::{InnerRow, differentiate_row_body};
use super::forward::gate_slices_body;
use crate::element::Element;
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use crate::vector::per_isa;

/// Elements of one task.
const PART: usize = 16 << 10;
/// Elements that are held in `f32` at once.
const BLOCK: usize = 256;

/// Gated activation: `out = act(gate) * up`.
///
/// # Shapes
/// All of the same length.
pub fn gated<T: Element>(activation: Activation, gate: &[T], up: &[T], out: &mut [T]) {
    assert!(gate.len() == up.len() && up.len() == out.len(), "gate, up and out have one length");
    let isa = Isa::active();
    let (len, out) = (out.len(), Shared::new(out));
    parallel::for_each_chunk(len, PART, |part| {
        // SAFETY: each task owns its part.
        let out = unsafe { out.slice(part.clone()) };
        forward(isa, activation, &gate[part.clone()], &up[part], out);
    });
}

/// Gradients of [`gated`].
///
/// # Shapes
/// All of the same length.
pub fn gated_backward<T: Element>(
    activation: Activation,
    [gate, up, dout]: [&[T]; 3],
    [dgate, dup]: [&mut [T]; 2],
) {
    assert!(gate.len() == up.len() && up.len() == dout.len(), "gate, up and dout have one length");
    assert!(dgate.len() == gate.len() && dup.len() == up.len(), "gradients are as long as their inputs");
    let isa = Isa::active();
    let (len, dgate, dup) = (gate.len(), Shared::new(dgate), Shared::new(dup));
    parallel::for_each_chunk(len, PART, |part| {
        // SAFETY: each task owns its part.
        let out = unsafe { [dgate.slice(part.clone()), dup.slice(part.clone())] };
        backward(isa, activation, [&gate[part.clone()], &up[part.clone()], &dout[part]], out);
    });
}

per_isa! {
    fn forward<T: Element>(activation: Activation, gate: &[T], up: &[T], out: &mut [T]) = forward_body;
}

#[inline(always)]
fn forward_body<T: Element, const FMA: bool>(activation: Activation, gate: &[T], up: &[T], out: &mut [T]) {
    let blocks = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(out.chunks_mut(BLOCK));
    for ((gate, up), out) in blocks {
        let (mut g, mut u) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        widen(gate, &mut g);
        widen(up, &mut u);
        gate_slices_body::<FMA>(activation, &mut g, &u);
        round(&g, out);
    }
}

per_isa! {
    fn backward<T: Element>(activation: Activation, inputs: [&[T]; 3], out: [&mut [T]; 2]) = backward_body;
}

#[inline(always)]
fn backward_body<T: Element, const FMA: bool>(
    activation: Activation,
    [gate, up, dout]: [&[T]; 3],
    [dgate, dup]: [&mut [T]; 2],
) {
    let inputs = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(dout.chunks(BLOCK));
    let outputs = dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK));
    for (((gate, up), dout), (dgate, dup)) in inputs.zip(outputs) {
        let [mut g, mut u, mut d] = [[0.0f32; BLOCK]; 3];
        widen(gate, &mut g);
        widen(up, &mut u);
        widen(dout, &mut d);
        let row = InnerRow { gate: &mut g, up: &mut u, inner: &mut d, weight: 1.0 };
        differentiate_row_body::<FMA>(activation, row);
        round(&g, dgate);
        round(&u, dup);
    }
}

#[inline(always)]
fn widen<T: Element>(from: &[T], to: &mut [f32; BLOCK]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.to_f32();
    }
}

#[inline(always)]
fn round<T: Element>(from: &[f32; BLOCK], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::from_f32(*from);
    }
}
