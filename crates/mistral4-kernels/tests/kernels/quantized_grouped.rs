//! Quantised linear layers of experts, over rows sorted by expert, against the plain twins.
use crate::quantized::{quantize, schemes, tolerance};
use crate::support::{Random, assert_close, on_each_isa, poison};
use mistral4_kernels::{
    Element, QuantizedMatrix, Scales, Scheme, StackDims, bf16, quantized_grouped_linear,
    quantized_grouped_linear_backward_input, reference,
};

/// Sizes of a call: matrices an expert, outputs of each, inputs, and the rows of four experts.
struct Case {
    parts: usize,
    outputs: usize,
    inputs: usize,
    offsets: [usize; 5],
}

const fn case(parts: usize, [outputs, inputs]: [usize; 2], offsets: [usize; 5]) -> Case {
    Case { parts, outputs, inputs, offsets }
}

/// With idle experts first, last and between, more rows than are packed at once, more columns than are dense at once.
const CASES: [Case; 7] = [
    case(1, [1, 1], [0, 1, 1, 1, 2]),
    case(2, [17, 7], [0, 0, 3, 3, 10]),
    case(1, [40, 130], [0, 7, 7, 8, 8]),
    case(2, [16, 64], [0, 0, 0, 33, 33]),
    case(2, [5, 600], [0, 2, 9, 9, 14]),
    case(1, [3, 70], [0, 0, 530, 531, 531]),
    case(2, [9, 33], [0; 5]),
];

fn weight(case: &Case, scheme: Scheme, random: &mut Random) -> QuantizedMatrix {
    let dims = StackDims { matrices: 4 * case.parts, rows: case.outputs, columns: case.inputs };
    quantize(random, dims, scheme)
}

fn compare<X: Element, Y: Element>() {
    for case in &CASES {
        let mut random = Random::new(case.inputs as u64);
        let Case { parts, outputs, inputs, offsets } = case;
        let (rows, outputs) = (offsets[4], parts * outputs);
        for scheme in schemes() {
            let weight = weight(case, scheme, &mut random);
            let what = format!("{:?} {scheme:?} {offsets:?}", weight.dims());
            let x = random.values::<X>(rows * inputs, 1.0);
            let (mut got, mut want) = (poison::<Y>(rows * outputs), poison::<Y>(rows * outputs));
            quantized_grouped_linear(offsets, &x, &weight, &mut got);
            reference::quantized_grouped_linear(offsets, &x, &weight, &mut want);
            assert_close(&what, &got, &want, tolerance::<Y>().max(tolerance::<X>() / 4.0));
            let dy = random.values::<Y>(rows * outputs, 1.0);
            let (mut got, mut want) = (poison::<X>(rows * inputs), poison::<X>(rows * inputs));
            quantized_grouped_linear_backward_input(offsets, &dy, &weight, &mut got);
            reference::quantized_grouped_linear_backward_input(offsets, &dy, &weight, &mut want);
            assert_close(&what, &got, &want, tolerance::<X>().max(tolerance::<Y>()));
        }
    }
}

#[test]
fn f32_rows() {
    on_each_isa(|_| compare::<f32, f32>());
}

#[test]
fn bf16_rows() {
    on_each_isa(|_| {
        compare::<bf16, bf16>();
        compare::<bf16, f32>();
    });
}

/// FP8 blocks of columns whose ends are not those of the blocks that become floats.
#[test]
fn fp8_blocks_of_any_width() {
    let mut random = Random::new(2);
    let (rows, offsets) = (19, [0, 4, 4, 11, 19]);
    for block in [20, 48, 300] {
        let dims = StackDims { matrices: 4, rows: 21, columns: 600 };
        let codes: Vec<u8> = (0..dims.elements()).map(|_| random.below(127) as u8).collect();
        let scales = (0..4 * 21 * 600usize.div_ceil(block)).map(|i| 1.0 / (1 + i % 7) as f32).collect();
        let scheme = Scheme::Fp8 { block };
        let weight = QuantizedMatrix::from_codes(dims, scheme, &codes, Scales::F32(scales), vec![]);
        let weight = weight.expect("usable parts");
        let dy = random.values::<f32>(rows * 21, 1.0);
        let (mut got, mut want) = (poison::<f32>(rows * 600), poison::<f32>(rows * 600));
        quantized_grouped_linear_backward_input(&offsets, &dy, &weight, &mut got);
        reference::quantized_grouped_linear_backward_input(&offsets, &dy, &weight, &mut want);
        assert_close(&format!("blocks of {block}"), &got, &want, tolerance::<f32>());
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let case = &CASES[4];
    for scheme in schemes() {
        let mut random = Random::new(5);
        let weight = weight(case, scheme, &mut random);
        let x = random.values::<bf16>(14 * 600, 1.0);
        let dy = random.values::<bf16>(14 * 10, 1.0);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let (mut y, mut dx) = (poison::<bf16>(14 * 10), poison::<bf16>(14 * 600));
                quantized_grouped_linear(&case.offsets, &x, &weight, &mut y);
                quantized_grouped_linear_backward_input(&case.offsets, &dy, &weight, &mut dx);
                (y, dx)
            })
        };
        assert!(run(1) == run(3), "{scheme:?}");
    }
}

#[test]
#[should_panic(expected = "no whole number for each expert")]
fn matrices_that_do_not_divide_are_refused() {
    let mut random = Random::new(6);
    let weight = quantize(&mut random, StackDims { matrices: 3, rows: 2, columns: 4 }, schemes()[0]);
    quantized_grouped_linear(&[0, 1, 1], &[1.0f32; 4], &weight, &mut [0.0f32; 2]);
}
