//! Plain quantised products: every weight made a float on its own, then the plain products of floats.
use crate::{
    Element, ExpertGrads, Experts, GemmDims, Index, Matrix, MatrixMut, QuantizedExperts, QuantizedMatrix,
    StackDims,
};

/// Every value of a stack, `[matrices, rows, columns]`.
pub fn dequantized(weight: &QuantizedMatrix) -> Vec<f32> {
    let StackDims { matrices, rows, columns } = weight.dims();
    let at = |i: usize| (i / columns / rows, i / columns % rows, i % columns);
    (0..matrices * rows * columns).map(at).map(|(m, r, c)| weight.value(m, r, c)).collect()
}

/// See [`crate::quantized_linear`].
pub fn quantized_linear<X: Element, Y: Element>(rows: usize, x: &[X], weight: &QuantizedMatrix, y: &mut [Y]) {
    let StackDims { rows: n, columns: k, .. } = weight.dims();
    let dense = dequantized(weight);
    let (a, b) = (Matrix::rows(x, k), Matrix::transposed(&dense, k));
    super::gemm(GemmDims { m: rows, n, k }, a, b, MatrixMut { data: y, row_stride: n }, false);
}

/// See [`crate::quantized_linear_backward_input`].
pub fn quantized_linear_backward_input<G: Element, X: Element>(
    rows: usize,
    dy: &[G],
    weight: &QuantizedMatrix,
    dx: &mut [X],
) {
    let StackDims { rows: k, columns: n, .. } = weight.dims();
    let dense = dequantized(weight);
    let (a, b) = (Matrix::rows(dy, k), Matrix::rows(&dense, n));
    super::gemm(GemmDims { m: rows, n, k }, a, b, MatrixMut { data: dx, row_stride: n }, false);
}

/// See [`crate::quantized_grouped_linear`].
pub fn quantized_grouped_linear<X: Element, Y: Element>(
    offsets: &[usize],
    x: &[X],
    weight: &QuantizedMatrix,
    y: &mut [Y],
) {
    let (experts, k) = (offsets.len() - 1, weight.dims().columns);
    let n = weight.dims().matrices / experts * weight.dims().rows;
    let dense = dequantized(weight);
    for expert in 0..experts {
        let (rows, w) = (offsets[expert]..offsets[expert + 1], &dense[expert * n * k..(expert + 1) * n * k]);
        let (a, b) = (Matrix::rows(&x[rows.start * k..], k), Matrix::transposed(w, k));
        let c = MatrixMut { data: &mut y[rows.start * n..rows.end * n], row_stride: n };
        super::gemm(GemmDims { m: rows.len(), n, k }, a, b, c, false);
    }
}

/// See [`crate::quantized_grouped_linear_backward_input`].
pub fn quantized_grouped_linear_backward_input<G: Element, X: Element>(
    offsets: &[usize],
    dy: &[G],
    weight: &QuantizedMatrix,
    dx: &mut [X],
) {
    let (experts, n) = (offsets.len() - 1, weight.dims().columns);
    let k = weight.dims().matrices / experts * weight.dims().rows;
    let dense = dequantized(weight);
    for expert in 0..experts {
        let (rows, w) = (offsets[expert]..offsets[expert + 1], &dense[expert * n * k..(expert + 1) * n * k]);
        let (a, b) = (Matrix::rows(&dy[rows.start * k..], k), Matrix::rows(w, n));
        let c = MatrixMut { data: &mut dx[rows.start * n..rows.end * n], row_stride: n };
        super::gemm(GemmDims { m: rows.len(), n, k }, a, b, c, false);
    }
}

/// See [`crate::quantized_experts`].
pub fn quantized_experts<X: Element, I: Index>(input: &QuantizedExperts<'_, X, I>, out: &mut [X]) {
    let (gate_up, down) = (dequantized(input.gate_up), dequantized(input.down));
    super::moe_experts(&dense(input, &gate_up, &down), out);
}

/// See [`crate::quantized_experts_backward`].
pub fn quantized_experts_backward<X: Element, I: Index>(
    input: &QuantizedExperts<'_, X, I>,
    dout: &[X],
    dx: &mut [X],
    dweights: &mut [f32],
) {
    let (gate_up, down) = (dequantized(input.gate_up), dequantized(input.down));
    let grads = ExpertGrads { x: Some(dx), weights: Some(dweights), gate_up: None, down: None };
    super::moe_experts_backward(&dense(input, &gate_up, &down), dout, grads);
}

fn dense<'a, X: Element, I: Index>(
    input: &QuantizedExperts<'a, X, I>,
    gate_up: &'a [f32],
    down: &'a [f32],
) -> Experts<'a, X, f32, I> {
    let QuantizedExperts { dims, activation, x, indices, weights, .. } = *input;
    Experts { dims, activation, x, indices, weights, gate_up, down }
}
