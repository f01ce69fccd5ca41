//! One linear layer an expert, over rows sorted by expert.
use crate::element::Element;
use crate::gemm::{LinearDims, linear, linear_backward_input, linear_backward_weight};
use crate::isa::Isa;
use crate::parallel::{self, Shared};
use std::ops::Range;

/// Sizes of [`grouped_linear`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupedLinearDims {
    /// E: experts.
    pub experts: usize,
    /// Columns of `x` and of each weight.
    pub inputs: usize,
    /// Columns of `y`, rows of each weight.
    pub outputs: usize,
}

/// Linear layer of each expert: `y[rows of e] = x[rows of e] weight[e]^T`, where the rows of expert `e` are
/// `offsets[e]..offsets[e + 1]`.
///
/// # Shapes
/// `offsets`: `[E + 1]`, rising from 0 to M; `x`: `[M, inputs]`, `weight`: `[E, outputs, inputs]`, `y`: `[M, outputs]`.
///
/// # Panics
/// When a slice has the wrong length or the offsets do not rise from 0 to M.
pub fn grouped_linear<X: Element, W: Element, Y: Element>(
    dims: GroupedLinearDims,
    offsets: &[usize],
    x: &[X],
    weight: &[W],
    y: &mut [Y],
) {
    dims.check(offsets, [x.len(), weight.len(), y.len()]);
    let GroupedLinearDims { inputs, outputs, .. } = dims;
    let y = Shared::new(y);
    for_each_expert(offsets, |expert, rows| {
        let x = &x[rows.start * inputs..rows.end * inputs];
        // SAFETY: each task owns the rows of one expert.
        let y = unsafe { y.slice(rows.start * outputs..rows.end * outputs) };
        linear(dims.of(&rows), x, dims.matrix(weight, expert), y);
    });
}

/// Input gradient of [`grouped_linear`]: `dx[rows of e] = dy[rows of e] weight[e]`.
///
/// # Shapes
/// As [`grouped_linear`]; `dy`: `[M, outputs]`, `dx`: `[M, inputs]`.
///
/// # Panics
/// As [`grouped_linear`].
pub fn grouped_linear_backward_input<G: Element, W: Element, X: Element>(
    dims: GroupedLinearDims,
    offsets: &[usize],
    dy: &[G],
    weight: &[W],
    dx: &mut [X],
) {
    dims.check(offsets, [dx.len(), weight.len(), dy.len()]);
    let GroupedLinearDims { inputs, outputs, .. } = dims;
    let dx = Shared::new(dx);
    for_each_expert(offsets, |expert, rows| {
        let dy = &dy[rows.start * outputs..rows.end * outputs];
        // SAFETY: each task owns the rows of one expert.
        let dx = unsafe { dx.slice(rows.start * inputs..rows.end * inputs) };
        linear_backward_input(dims.of(&rows), dy, dims.matrix(weight, expert), dx, false);
    });
}

/// Weight gradient of [`grouped_linear`]: `dweight[e] = dy[rows of e]^T x[rows of e]`, zero for experts without rows.
///
/// # Shapes
/// As [`grouped_linear`]; `dy`: `[M, outputs]`, `dweight`: `[E, outputs, inputs]`.
///
/// # Panics
/// As [`grouped_linear`].
pub fn grouped_linear_backward_weight<G: Element, X: Element, W: Element>(
    dims: GroupedLinearDims,
    offsets: &[usize],
    dy: &[G],
    x: &[X],
    dweight: &mut [W],
) {
    dims.check(offsets, [x.len(), dweight.len(), dy.len()]);
    let GroupedLinearDims { inputs, outputs, experts } = dims;
    let (isa, dweight) = (Isa::active(), Shared::new(dweight));
    parallel::for_each(experts, |expert| {
        let rows = offsets[expert]..offsets[expert + 1];
        // SAFETY: each task owns the matrix of one expert.
        let dweight = unsafe { dweight.slice(expert * outputs * inputs..(expert + 1) * outputs * inputs) };
        if rows.is_empty() {
            dweight.fill(W::default());
            return;
        }
        let x = &x[rows.start * inputs..rows.end * inputs];
        let dy = &dy[rows.start * outputs..rows.end * outputs];
        isa.run(|| linear_backward_weight(dims.of(&rows), dy, x, dweight, false));
    });
}

/// Runs `task` for every expert that has rows.
fn for_each_expert(offsets: &[usize], task: impl Fn(usize, Range<usize>) + Sync + Send) {
    let used: Vec<(usize, Range<usize>)> = offsets
        .windows(2)
        .enumerate()
        .map(|(expert, pair)| (expert, pair[0]..pair[1]))
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let isa = Isa::active();
    parallel::for_each(used.len(), |index| {
        let (expert, rows) = &used[index];
        isa.run(|| task(*expert, rows.clone()));
    });
}

impl GroupedLinearDims {
    fn of(&self, rows: &Range<usize>) -> LinearDims {
        LinearDims { rows: rows.len(), inputs: self.inputs, outputs: self.outputs }
    }

    fn matrix<'a, W>(&self, weight: &'a [W], expert: usize) -> &'a [W] {
        &weight[expert * self.outputs * self.inputs..][..self.outputs * self.inputs]
    }

    fn check(&self, offsets: &[usize], [x, weight, y]: [usize; 3]) {
        let Self { experts, inputs, outputs } = *self;
        assert_eq!(offsets.len(), experts + 1, "offsets are [E + 1]");
        assert!(offsets[0] == 0 && offsets.is_sorted(), "offsets rise from 0");
        let rows = offsets[experts];
        assert_eq!(x, rows * inputs, "x is [M, inputs]");
        assert_eq!(weight, experts * outputs * inputs, "weight is [E, outputs, inputs]");
        assert_eq!(y, rows * outputs, "y is [M, outputs]");
    }
}
