//! The linear layer `y = x w^T` and its two gradients.
use super::{GemmDims, Matrix, MatrixMut, gemm};
use crate::element::Element;

/// Sizes of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearDims {
    /// Rows of `x` and `y` (tokens).
    pub rows: usize,
    /// Columns of `x` and of the weight.
    pub inputs: usize,
    /// Columns of `y`, rows of the weight.
    pub outputs: usize,
}

/// Linear layer `y = x weight^T`.
///
/// # Shapes
/// `x`: `[rows, inputs]`, `weight`: `[outputs, inputs]`, `y`: `[rows, outputs]`.
pub fn linear<X: Element, W: Element, Y: Element>(dims: LinearDims, x: &[X], weight: &[W], y: &mut [Y]) {
    let LinearDims { rows, inputs, outputs } = dims;
    assert_eq!(x.len(), rows * inputs);
    assert_eq!(weight.len(), outputs * inputs);
    assert_eq!(y.len(), rows * outputs);
    gemm(
        GemmDims { m: rows, n: outputs, k: inputs },
        Matrix::rows(x, inputs),
        Matrix::transposed(weight, inputs),
        MatrixMut { data: y, row_stride: outputs },
        false,
    );
}

/// Input gradient of [`linear`]: `dx = dy weight`, or `dx += dy weight` with `accumulate`.
///
/// # Shapes
/// `dy`: `[rows, outputs]`, `weight`: `[outputs, inputs]`, `dx`: `[rows, inputs]`.
pub fn linear_backward_input<G: Element, W: Element, X: Element>(
    dims: LinearDims,
    dy: &[G],
    weight: &[W],
    dx: &mut [X],
    accumulate: bool,
) {
    let LinearDims { rows, inputs, outputs } = dims;
    assert_eq!(dy.len(), rows * outputs);
    assert_eq!(weight.len(), outputs * inputs);
    assert_eq!(dx.len(), rows * inputs);
    gemm(
        GemmDims { m: rows, n: inputs, k: outputs },
        Matrix::rows(dy, outputs),
        Matrix::rows(weight, inputs),
        MatrixMut { data: dx, row_stride: inputs },
        accumulate,
    );
}

/// Weight gradient of [`linear`]: `dweight = dy^T x`, or `dweight += dy^T x` with `accumulate`.
///
/// # Shapes
/// `dy`: `[rows, outputs]`, `x`: `[rows, inputs]`, `dweight`: `[outputs, inputs]`.
pub fn linear_backward_weight<G: Element, X: Element, W: Element>(
    dims: LinearDims,
    dy: &[G],
    x: &[X],
    dweight: &mut [W],
    accumulate: bool,
) {
    let LinearDims { rows, inputs, outputs } = dims;
    assert_eq!(dy.len(), rows * outputs);
    assert_eq!(x.len(), rows * inputs);
    assert_eq!(dweight.len(), outputs * inputs);
    gemm(
        GemmDims { m: outputs, n: inputs, k: rows },
        Matrix::transposed(dy, outputs),
        Matrix::rows(x, inputs),
        MatrixMut { data: dweight, row_stride: inputs },
        accumulate,
    );
}
