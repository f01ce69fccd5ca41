//! Plain matrix product.
use crate::{Element, GemmDims, Matrix, MatrixMut};

/// See [`crate::gemm`].
pub fn gemm<A: Element, B: Element, C: Element>(
    dims: GemmDims,
    a: Matrix<'_, A>,
    b: Matrix<'_, B>,
    c: MatrixMut<'_, C>,
    accumulate: bool,
) {
    for i in 0..dims.m {
        for j in 0..dims.n {
            let mut sum = 0.0f64;
            for k in 0..dims.k {
                let a = a.data[i * a.row_stride + k * a.col_stride].to_f32();
                let b = b.data[k * b.row_stride + j * b.col_stride].to_f32();
                sum += f64::from(a) * f64::from(b);
            }
            let c = &mut c.data[i * c.row_stride + j];
            *c = C::from_f32(if accumulate { c.to_f32() + sum as f32 } else { sum as f32 });
        }
    }
}
