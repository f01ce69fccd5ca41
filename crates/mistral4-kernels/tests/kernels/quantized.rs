//! Quantised weights: what they stand for, and their products against the plain twins.
use crate::support::{Random, assert_close, on_each_isa, poison};
use mistral4_kernels::{
    Activation, Bits, Element, ExpertDims, QuantizeError, QuantizedExperts, QuantizedMatrix, Scales, Scheme,
    StackDims, bf16, quantized_experts, quantized_experts_backward, quantized_linear,
    quantized_linear_backward_input, reference,
};

fn int(bits: Bits, group_size: usize, symmetric: bool) -> Scheme {
    Scheme::Int { bits, group_size, symmetric }
}

pub(crate) fn schemes() -> [Scheme; 6] {
    [
        int(Bits::Eight, 32, true),
        int(Bits::Eight, 128, false),
        int(Bits::Four, 32, true),
        int(Bits::Four, 64, false),
        int(Bits::Four, 256, true),
        Scheme::Fp8 { block: usize::MAX },
    ]
}

/// Weights whose groups differ in size and lie off zero, so that zero points matter.
fn weights(random: &mut Random, len: usize) -> Vec<f32> {
    (0..len).map(|i| (random.unit() + 0.3) * 2.0f32.powi((i / 32 % 5) as i32 - 3)).collect()
}

pub(crate) fn quantize(random: &mut Random, dims: StackDims, scheme: Scheme) -> QuantizedMatrix {
    QuantizedMatrix::quantize(dims, scheme, &weights(random, dims.elements())).expect("finite weights")
}

/// Bound on the relative error of sums: weights or activations that were rounded to bf16 on the way, or activations
/// rounded to 15 bits.
pub(crate) fn tolerance<T: Element>() -> f32 {
    if T::IS_BF16 { 2e-2 } else { 2e-4 }
}

#[test]
fn rounding_is_within_half_a_step() {
    let mut random = Random::new(1);
    let dims = StackDims { matrices: 2, rows: 19, columns: 101 };
    let values = weights(&mut random, dims.elements());
    for (scheme, most) in schemes().into_iter().zip([0.006, 0.006, 0.09, 0.09, 0.13, 0.07]) {
        let quantized = QuantizedMatrix::quantize(dims, scheme, &values).expect("finite weights");
        let restored = reference::dequantized(&quantized);
        let square = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>();
        let error = square(&mut values.iter().zip(&restored).map(|(a, b)| a - b));
        let relative = (error / square(&mut values.iter().copied())).sqrt();
        assert!(relative < most, "{scheme:?}: {relative}");
        if let Scheme::Int { bits: Bits::Eight, group_size, .. } = scheme {
            for (i, (value, restored)) in values.iter().zip(&restored).enumerate() {
                let (row, column) = (i / dims.columns, i % dims.columns);
                let scale = quantized.scale(row / dims.rows, row % dims.rows, column / group_size);
                // The scale was rounded to bf16, so the largest codes may be cut off by a little.
                assert!((value - restored).abs() <= 1.1 * scale, "{scheme:?} {value} {restored} {scale}");
            }
        }
        let mut matrix = poison::<f32>(dims.rows * dims.columns);
        for (m, want) in restored.chunks(matrix.len()).enumerate() {
            on_each_isa(|_| {
                let mut matrix = matrix.clone();
                quantized.dequantize(m, &mut matrix);
                assert_close(&format!("{scheme:?}"), &matrix, want, 1e-7);
            });
        }
        quantized.dequantize(0, &mut matrix);
        assert_eq!(matrix, restored[..matrix.len()]);
    }
}

#[test]
fn special_groups() {
    let dims = StackDims { matrices: 1, rows: 3, columns: 64 };
    for scheme in schemes() {
        let mut values = vec![0.0f32; 192];
        // A group of zeros, one of a single value, one far from zero.
        values[64] = -3.0;
        values[128..].fill(7.0);
        let quantized = QuantizedMatrix::quantize(dims, scheme, &values).expect("finite weights");
        let got = reference::dequantized(&quantized);
        assert_close(&format!("{scheme:?}"), &got, &values, 5e-3);
        for bad in [f32::NAN, f32::INFINITY] {
            values[70] = bad;
            let error = QuantizedMatrix::quantize(dims, scheme, &values);
            assert_eq!(error, Err(QuantizeError::NotFinite { matrix: 0, row: 1, column: 6 }), "{scheme:?}");
        }
    }
}

#[test]
fn unusable_parts_are_refused() {
    let dims = StackDims { matrices: 1, rows: 2, columns: 40 };
    let scheme = int(Bits::Four, 32, false);
    let build = |codes: &[u8], scales: usize, zeros: Vec<u8>| {
        QuantizedMatrix::from_codes(dims, scheme, codes, Scales::F32(vec![1.0; scales]), zeros)
    };
    assert!(build(&[3; 80], 4, vec![8; 4]).is_ok());
    assert!(matches!(build(&[3; 79], 4, vec![8; 4]), Err(QuantizeError::Length { name: "codes", .. })));
    assert!(matches!(build(&[3; 80], 3, vec![8; 4]), Err(QuantizeError::Length { name: "scales", .. })));
    assert!(matches!(build(&[3; 80], 4, vec![]), Err(QuantizeError::Length { name: "zeros", .. })));
    assert!(matches!(build(&[16; 80], 4, vec![8; 4]), Err(QuantizeError::Code { name: "codes", .. })));
    let odd = QuantizedMatrix::quantize(dims, int(Bits::Four, 48, true), &[0.0f32; 80]);
    assert_eq!(odd, Err(QuantizeError::GroupSize { group_size: 48 }));
    let fp8 = |block, code| {
        let scales = Scales::F32(vec![1.0; 2 * 40usize.div_ceil(block)]);
        QuantizedMatrix::from_codes(dims, Scheme::Fp8 { block }, &[code; 80], scales, vec![])
    };
    assert!(matches!(fp8(10, 0), Err(QuantizeError::Block { block: 10, columns: 40 })));
    let error = fp8(40, 0xff);
    assert_eq!(error, Err(QuantizeError::NotFinite { matrix: 0, row: 0, column: 0 }));
}

#[test]
fn codes_scales_and_zeros_come_back_as_given() {
    let mut random = Random::new(2);
    let dims = StackDims { matrices: 3, rows: 18, columns: 45 };
    for bits in [Bits::Four, Bits::Eight] {
        let mut codes = |count| -> Vec<u8> {
            (0..count).map(|_| random.below(usize::from(bits.largest()) + 1) as u8).collect()
        };
        let (values, zeros) = (codes(dims.elements()), codes(3 * 18 * 2));
        let scales: Vec<bf16> = (0..3 * 18 * 2).map(|i| bf16::from_f32(i as f32)).collect();
        let scheme = int(bits, 32, false);
        let stack =
            QuantizedMatrix::from_codes(dims, scheme, &values, Scales::Bf16(scales.clone()), zeros.clone());
        let stack = stack.expect("usable parts");
        for (i, code) in values.iter().enumerate() {
            let (row, column) = (i / 45, i % 45);
            assert_eq!(stack.code(row / 18, row % 18, column), *code);
        }
        for (i, (scale, zero)) in scales.iter().zip(zeros).enumerate() {
            let (row, group) = (i / 2, i % 2);
            assert_eq!(stack.scale(row / 18, row % 18, group), Element::to_f32(*scale));
            assert_eq!(stack.zero(row / 18, row % 18, group), zero);
        }
    }
}

/// A scale for each row and block of columns, as checkpoints hold them.
#[test]
fn parts_are_some_matrices_and_panels_make_up_the_stack_again() {
    let mut random = Random::new(5);
    let dims = StackDims { matrices: 4, rows: 37, columns: 70 };
    for scheme in schemes() {
        let stack = quantize(&mut random, dims, scheme);
        let some = stack.matrices(1..3);
        assert_eq!(some.dims(), StackDims { matrices: 2, ..dims });
        let values = reference::dequantized(&stack);
        let each = dims.rows * dims.columns;
        assert_eq!(reference::dequantized(&some), values[each..3 * each]);
        // Panels end within matrices, and one part is empty.
        let ends = [0, 5, 5, stack.all_panels()];
        let parts: Vec<_> = ends.windows(2).map(|ends| stack.panels_as_matrix(ends[0]..ends[1])).collect();
        let bytes: Vec<_> = parts.iter().map(QuantizedMatrix::to_bytes).collect();
        for part in &parts {
            assert_eq!(part.joined(dims, bytes.iter().map(Vec::as_slice)), stack, "{scheme:?}");
        }
    }
}

#[test]
fn fp8_blocks() {
    let mut random = Random::new(3);
    let dims = StackDims { matrices: 1, rows: 37, columns: 50 };
    let finite = |code: u8| if code & 0x7f == 0x7f { 0 } else { code };
    let codes: Vec<u8> = (0..dims.elements()).map(|_| finite(random.below(256) as u8)).collect();
    let build = |block: usize, scale: &dyn Fn(usize) -> f32| {
        let scales = (0..37 * 50usize.div_ceil(block)).map(scale).collect();
        QuantizedMatrix::from_codes(dims, Scheme::Fp8 { block }, &codes, Scales::F32(scales), vec![])
            .expect("usable parts")
    };
    let plain = build(50, &|_| 1.0);
    for block in [8, 32, 50] {
        let scale = |i: usize| 0.25 + i as f32;
        let weight = build(block, &scale);
        for (row, column) in [(0, 0), (36, 49), (8, 7), (31, 32), (7, 8)] {
            let scale = scale(row * 50usize.div_ceil(block) + column / block);
            assert_eq!(weight.value(0, row, column), plain.value(0, row, column) * scale);
        }
        on_each_isa(|_| products::<bf16, bf16>(&weight, &mut Random::new(4)));
    }
}

fn products<X: Element, Y: Element>(weight: &QuantizedMatrix, random: &mut Random) {
    let StackDims { rows: outputs, columns: inputs, .. } = weight.dims();
    for rows in [0, 1, 2, 3, 5, 6, 7, 11, 16, 50] {
        let what = format!("{rows} rows, {:?} {:?}", weight.dims(), weight.scheme());
        let x = random.values::<X>(rows * inputs, 1.0);
        let (mut got, mut want) = (poison::<Y>(rows * outputs), poison::<Y>(rows * outputs));
        quantized_linear(rows, &x, weight, &mut got);
        reference::quantized_linear(rows, &x, weight, &mut want);
        assert_close(&what, &got, &want, tolerance::<Y>().max(tolerance::<X>() / 4.0));
        let dy = random.values::<Y>(rows * outputs, 1.0);
        let (mut got, mut want) = (poison::<X>(rows * inputs), poison::<X>(rows * inputs));
        quantized_linear_backward_input(rows, &dy, weight, &mut got);
        reference::quantized_linear_backward_input(rows, &dy, weight, &mut want);
        assert_close(&what, &got, &want, tolerance::<X>().max(tolerance::<Y>()));
    }
}

#[test]
fn linear_layers() {
    on_each_isa(|_| {
        let mut random = Random::new(5);
        for [outputs, inputs] in [[1, 1], [16, 32], [17, 7], [40, 130], [5, 300], [96, 256]] {
            for scheme in schemes() {
                let dims = StackDims { matrices: 1, rows: outputs, columns: inputs };
                let weight = quantize(&mut random, dims, scheme);
                products::<f32, f32>(&weight, &mut random);
                products::<bf16, bf16>(&weight, &mut random);
                products::<bf16, f32>(&weight, &mut random);
            }
        }
    });
}

/// A value that is not finite reaches the outputs of its row, and only those.
#[test]
fn nan_inputs_show() {
    on_each_isa(|_| {
        let mut random = Random::new(6);
        for scheme in schemes() {
            let weight = quantize(&mut random, StackDims { matrices: 1, rows: 20, columns: 70 }, scheme);
            let mut x = random.values::<bf16>(3 * 70, 1.0);
            x[70 + 65] = bf16::from_f32(f32::NAN);
            let mut y = vec![0.0f32; 60];
            quantized_linear(3, &x, &weight, &mut y);
            assert!(y[20..40].iter().all(|y| y.is_nan()));
            assert!(y[..20].iter().chain(&y[40..]).all(|y| y.is_finite()));
        }
    });
}

struct Case<X> {
    dims: ExpertDims,
    x: Vec<X>,
    dout: Vec<X>,
    indices: Vec<i32>,
    weights: Vec<f32>,
    gate_up: QuantizedMatrix,
    down: QuantizedMatrix,
}

const SIZES: [ExpertDims; 4] = [
    ExpertDims { tokens: 1, top_k: 1, experts: 1, hidden: 1, inter: 1 },
    ExpertDims { tokens: 1, top_k: 2, experts: 5, hidden: 33, inter: 17 },
    ExpertDims { tokens: 19, top_k: 3, experts: 9, hidden: 40, inter: 31 },
    ExpertDims { tokens: 90, top_k: 2, experts: 4, hidden: 70, inter: 48 },
];

impl<X: Element> Case<X> {
    fn new(dims: ExpertDims, scheme: Scheme) -> Self {
        let ExpertDims { tokens, top_k, experts, hidden, inter } = dims;
        let mut random = Random::new(tokens as u64);
        // Experts 0 and the last stay empty when there are enough of them.
        let choices = if experts > 4 { 1..experts - 1 } else { 0..experts };
        let mut indices = Vec::new();
        for _ in 0..tokens {
            let first = random.below(choices.len());
            indices.extend((0..top_k).map(|k| (choices.start + (first + k) % choices.len()) as i32));
        }
        let gate_up = StackDims { matrices: 2 * experts, rows: inter, columns: hidden };
        let down = StackDims { matrices: experts, rows: hidden, columns: inter };
        Self {
            dims,
            indices,
            x: random.values(tokens * hidden, 0.5),
            dout: random.values(tokens * hidden, 1.0),
            weights: random.values(tokens * top_k, 1.0),
            gate_up: quantize(&mut random, gate_up, scheme),
            down: quantize(&mut random, down, scheme),
        }
    }

    fn input(&self, activation: Activation) -> QuantizedExperts<'_, X, i32> {
        QuantizedExperts {
            dims: self.dims,
            activation,
            x: &self.x,
            indices: &self.indices,
            weights: &self.weights,
            gate_up: &self.gate_up,
            down: &self.down,
        }
    }

    fn compare(&self, activation: Activation) {
        let input = self.input(activation);
        let what = |name| format!("{name} {activation:?} {:?} {:?}", self.dims, self.gate_up.scheme());
        let (mut got, mut want) = (poison::<X>(self.x.len()), poison::<X>(self.x.len()));
        quantized_experts(&input, &mut got);
        reference::quantized_experts(&input, &mut want);
        assert_close(&what("out"), &got, &want, tolerance::<X>());
        let gradients = || (poison::<X>(self.x.len()), poison::<f32>(self.weights.len()));
        let (mut got, mut want) = (gradients(), gradients());
        quantized_experts_backward(&input, &self.dout, &mut got.0, &mut got.1);
        reference::quantized_experts_backward(&input, &self.dout, &mut want.0, &mut want.1);
        assert_close(&what("dx"), &got.0, &want.0, 2.0 * tolerance::<X>());
        assert_close(&what("dweights"), &got.1, &want.1, 2.0 * tolerance::<X>());
    }
}

#[test]
fn experts() {
    on_each_isa(|_| {
        for dims in SIZES {
            for scheme in schemes() {
                Case::<f32>::new(dims, scheme).compare(Activation::Silu);
                Case::<bf16>::new(dims, scheme).compare(Activation::Silu);
            }
            Case::<f32>::new(dims, schemes()[2]).compare(Activation::GeluTanh);
        }
    });
}

#[test]
fn no_tokens() {
    let case = Case::<f32>::new(ExpertDims { tokens: 0, ..SIZES[2] }, schemes()[0]);
    quantized_experts(&case.input(Activation::Silu), &mut []);
    quantized_experts_backward(&case.input(Activation::Silu), &[], &mut [], &mut []);
}

#[test]
fn results_do_not_depend_on_threads() {
    for scheme in schemes() {
        let case = Case::<bf16>::new(SIZES[3], scheme);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let mut out = poison::<bf16>(case.x.len());
                quantized_experts(&case.input(Activation::Silu), &mut out);
                let (mut dx, mut dweights) =
                    (poison::<bf16>(case.x.len()), poison::<f32>(case.weights.len()));
                quantized_experts_backward(&case.input(Activation::Silu), &case.dout, &mut dx, &mut dweights);
                (out, dx, dweights)
            })
        };
        assert!(run(1) == run(3));
    }
}
