//! Matrix products against the plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Element, GemmDims, LinearDims, Matrix, MatrixMut, bf16, gemm, linear, linear_backward_input,
    linear_backward_weight, reference,
};

const SIZES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [1, 33, 7],
    [2, 64, 128],
    [3, 40, 65],
    [5, 31, 32],
    [7, 100, 1],
    [8, 96, 130],
    [12, 32, 64],
    [13, 33, 63],
    [25, 70, 19],
    [64, 5, 301],
    [100, 65, 2],
    [15, 300, 1100],
    [3, 70, 530],
];

fn layouts<A: Element, B: Element, C: Element>() {
    let mut random = Random::new(1);
    for [m, n, k] in SIZES {
        let dims = GemmDims { m, n, k };
        let (a, b) = (random.values::<A>(m * k, 1.0), random.values::<B>(k * n, 1.0));
        let start = random.values::<C>(m * n, 1.0);
        for a in [Matrix::rows(&a, k), Matrix::transposed(&a, m)] {
            for b in [Matrix::rows(&b, n), Matrix::transposed(&b, k)] {
                for accumulate in [false, true] {
                    let mut want = start.clone();
                    reference::gemm(dims, a, b, MatrixMut { data: &mut want, row_stride: n }, accumulate);
                    let mut got = if accumulate { start.clone() } else { poison(m * n) };
                    gemm(dims, a, b, MatrixMut { data: &mut got, row_stride: n }, accumulate);
                    assert_close(&format!("{dims:?} {accumulate}"), &got, &want, tolerance::<C>());
                }
            }
        }
    }
}

#[test]
fn f32_products() {
    on_each_isa(|_| layouts::<f32, f32, f32>());
}

#[test]
fn bf16_products() {
    on_each_isa(|_| {
        layouts::<bf16, bf16, f32>();
        layouts::<bf16, bf16, bf16>();
        layouts::<f32, bf16, f32>();
        layouts::<bf16, f32, bf16>();
    });
}

#[test]
fn output_stride_leaves_gaps_alone() {
    on_each_isa(|_| {
        let dims = GemmDims { m: 14, n: 37, k: 9 };
        let mut random = Random::new(2);
        let (a, b) = (random.values::<f32>(14 * 9, 1.0), random.values::<f32>(9 * 37, 1.0));
        let (mut got, mut want) = (vec![5.0f32; 14 * 50], vec![5.0f32; 14 * 50]);
        let views = (Matrix::rows(&a, 9), Matrix::rows(&b, 37));
        gemm(dims, views.0, views.1, MatrixMut { data: &mut got, row_stride: 50 }, false);
        reference::gemm(dims, views.0, views.1, MatrixMut { data: &mut want, row_stride: 50 }, false);
        assert_close("strided", &got, &want, 1e-6);
    });
}

#[test]
fn empty_sizes() {
    gemm(
        GemmDims { m: 0, n: 3, k: 2 },
        Matrix::<f32>::rows(&[], 2),
        Matrix::rows(&[1.0f32; 6], 3),
        MatrixMut { data: &mut [0.0f32; 0], row_stride: 3 },
        false,
    );
    let mut c = [f32::NAN; 6];
    gemm(
        GemmDims { m: 2, n: 3, k: 0 },
        Matrix::<f32>::rows(&[], 0),
        Matrix::<f32>::rows(&[], 3),
        MatrixMut { data: &mut c, row_stride: 3 },
        false,
    );
    assert_eq!(c, [0.0; 6]);
}

fn linear_and_gradients<X: Element, W: Element>() {
    let mut random = Random::new(3);
    for [rows, outputs, inputs] in SIZES {
        let dims = LinearDims { rows, inputs, outputs };
        let x = random.values::<X>(rows * inputs, 1.0);
        let w = random.values::<W>(outputs * inputs, 1.0);
        let dy = random.values::<X>(rows * outputs, 1.0);
        let (mut got, mut want) = (poison::<X>(rows * outputs), poison::<X>(rows * outputs));
        linear(dims, &x, &w, &mut got);
        reference::gemm(
            GemmDims { m: rows, n: outputs, k: inputs },
            Matrix::rows(&x, inputs),
            Matrix::transposed(&w, inputs),
            MatrixMut { data: &mut want, row_stride: outputs },
            false,
        );
        assert_close("y", &got, &want, tolerance::<X>());
        let (mut got, mut want) = (poison::<X>(rows * inputs), poison::<X>(rows * inputs));
        linear_backward_input(dims, &dy, &w, &mut got, false);
        reference::gemm(
            GemmDims { m: rows, n: inputs, k: outputs },
            Matrix::rows(&dy, outputs),
            Matrix::rows(&w, inputs),
            MatrixMut { data: &mut want, row_stride: inputs },
            false,
        );
        assert_close("dx", &got, &want, tolerance::<X>());
        let mut got = random.values::<W>(outputs * inputs, 1.0);
        let mut want = got.clone();
        linear_backward_weight(dims, &dy, &x, &mut got, true);
        reference::gemm(
            GemmDims { m: outputs, n: inputs, k: rows },
            Matrix::transposed(&dy, outputs),
            Matrix::rows(&x, inputs),
            MatrixMut { data: &mut want, row_stride: inputs },
            true,
        );
        assert_close("dweight", &got, &want, tolerance::<W>());
    }
}

#[test]
fn linear_layers() {
    on_each_isa(|_| {
        linear_and_gradients::<f32, f32>();
        linear_and_gradients::<bf16, bf16>();
        linear_and_gradients::<f32, bf16>();
    });
}

/// The number of threads and the other rows of a batch do not change a result.
#[test]
fn results_do_not_depend_on_threads() {
    let dims = LinearDims { rows: 67, inputs: 130, outputs: 200 };
    let mut random = Random::new(4);
    let x = random.values::<bf16>(dims.rows * dims.inputs, 1.0);
    let w = random.values::<bf16>(dims.outputs * dims.inputs, 1.0);
    let run = |threads: usize| {
        let mut y = poison::<f32>(dims.rows * dims.outputs);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| linear(dims, &x, &w, &mut y));
        y
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(one, run(threads));
    }
}
