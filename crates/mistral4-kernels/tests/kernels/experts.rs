//! Routed experts against the plain twin.
use crate::optimizer::HYPER;
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Activation, AdamWState, AdamWWeight, DeferredGradient, Element, ExpertDims, ExpertGrads, Experts,
    GemmDims, GroupedLinearDims, Index, Matrix, MatrixMut, adamw_step, bf16, grouped_linear,
    grouped_linear_backward_input, grouped_linear_backward_weight, moe_experts, moe_experts_backward,
    moe_experts_backward_deferring, moe_experts_keeping, reference,
};

const SIZES: [ExpertDims; 6] = [
    ExpertDims { tokens: 1, top_k: 1, experts: 1, hidden: 1, inter: 1 },
    ExpertDims { tokens: 1, top_k: 2, experts: 5, hidden: 33, inter: 17 },
    ExpertDims { tokens: 7, top_k: 3, experts: 9, hidden: 40, inter: 31 },
    ExpertDims { tokens: 50, top_k: 2, experts: 4, hidden: 64, inter: 32 },
    ExpertDims { tokens: 30, top_k: 1, experts: 2, hidden: 300, inter: 270 },
    ExpertDims { tokens: 41, top_k: 4, experts: 64, hidden: 35, inter: 50 },
];

struct Case<X, W, I> {
    dims: ExpertDims,
    x: Vec<X>,
    indices: Vec<I>,
    weights: Vec<f32>,
    gate_up: Vec<W>,
    down: Vec<W>,
    dout: Vec<X>,
}

impl<X: Element, W: Element, I: Index> Case<X, W, I> {
    fn new(dims: ExpertDims, index: impl Fn(usize) -> I) -> Self {
        let ExpertDims { tokens, top_k, experts, hidden, inter } = dims;
        let mut random = Random::new(tokens as u64);
        // Experts 0 and the last stay empty when there are enough of them.
        let choices = if experts > 4 { 1..experts - 1 } else { 0..experts };
        let mut indices = Vec::new();
        for _ in 0..tokens {
            let first = random.below(choices.len());
            indices.extend((0..top_k).map(|k| index(choices.start + (first + k) % choices.len())));
        }
        Self {
            dims,
            indices,
            x: random.values(tokens * hidden, 1.0),
            weights: random.values(tokens * top_k, 1.0),
            gate_up: random.values(experts * 2 * inter * hidden, 0.5),
            down: random.values(experts * hidden * inter, 0.5),
            dout: random.values(tokens * hidden, 1.0),
        }
    }

    fn input(&self, activation: Activation) -> Experts<'_, X, W, I> {
        Experts {
            dims: self.dims,
            activation,
            x: &self.x,
            indices: &self.indices,
            weights: &self.weights,
            gate_up: &self.gate_up,
            down: &self.down,
        }
    }

    /// What the forward pass keeps for the backward pass.
    fn kept(&self, activation: Activation) -> Vec<X> {
        let mut kept = poison(self.indices.len() * 2 * self.dims.inter);
        moe_experts_keeping(&self.input(activation), &mut kept, &mut poison(self.x.len()));
        kept
    }
}

fn compare<X: Element, W: Element, I: Index>(index: impl Fn(usize) -> I + Copy) {
    for dims in SIZES {
        let case = Case::<X, W, I>::new(dims, index);
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            let input = case.input(activation);
            let (mut got, mut want) = (poison::<X>(case.x.len()), poison::<X>(case.x.len()));
            moe_experts(&input, &mut got);
            reference::moe_experts(&input, &mut want);
            assert_close(&format!("{activation:?} {dims:?}"), &got, &want, tolerance::<X>());

            let mut kept = poison(case.indices.len() * 2 * dims.inter);
            moe_experts_keeping(&input, &mut kept, &mut got);
            assert_close(&format!("keeping, {activation:?} {dims:?}"), &got, &want, tolerance::<X>());

            let mut got = Grads::new(&case);
            moe_experts_backward(&input, &kept, &case.dout, got.all());
            let mut want = Grads::new(&case);
            reference::moe_experts_backward(&input, &case.dout, want.all());
            let what = |name| format!("{name} {activation:?} {dims:?}");
            let bf16 = tolerance::<X>().max(tolerance::<W>());
            assert_close(&what("dx"), &got.x, &want.x, tolerance::<X>());
            assert_close(&what("dweights"), &got.weights, &want.weights, tolerance::<X>());
            assert_close(&what("dgate_up"), &got.gate_up, &want.gate_up, bf16);
            assert_close(&what("ddown"), &got.down, &want.down, bf16);
        }
    }
}

struct Grads<X, W> {
    x: Vec<X>,
    weights: Vec<f32>,
    gate_up: Vec<W>,
    down: Vec<W>,
}

impl<X: Element, W: Element> Grads<X, W> {
    fn new<I>(case: &Case<X, W, I>) -> Self {
        Self {
            x: poison(case.x.len()),
            weights: poison(case.weights.len()),
            gate_up: poison(case.gate_up.len()),
            down: poison(case.down.len()),
        }
    }

    fn all(&mut self) -> ExpertGrads<'_, X, W> {
        ExpertGrads {
            x: Some(&mut self.x),
            weights: Some(&mut self.weights),
            gate_up: Some(&mut self.gate_up),
            down: Some(&mut self.down),
        }
    }
}

#[test]
fn f32_experts() {
    on_each_isa(|_| compare::<f32, f32, i32>(|i| i as i32));
}

#[test]
fn bf16_experts() {
    on_each_isa(|_| {
        compare::<bf16, bf16, i64>(|i| i as i64);
        compare::<f32, bf16, i32>(|i| i as i32);
    });
}

/// A weight with its moments, after some steps.
#[derive(Clone, PartialEq, Debug)]
struct Weight<V, S> {
    param: Vec<V>,
    rounded: Option<Vec<bf16>>,
    exp_avg: Vec<S>,
    exp_avg_sq: Vec<S>,
}

impl<V: Element, S: Element> Weight<V, S> {
    fn new(param: &[V], with_rounded: bool) -> Self {
        let mut random = Random::new(99);
        let squares: Vec<f32> = random.values(param.len(), 0.3);
        Self {
            param: param.to_vec(),
            rounded: with_rounded.then(|| poison(param.len())),
            exp_avg: random.values(param.len(), 0.3),
            exp_avg_sq: squares.iter().map(|x| S::from_f32(x * x)).collect(),
        }
    }

    fn all(&mut self) -> AdamWWeight<'_, V, S> {
        AdamWWeight {
            param: &mut self.param,
            rounded: self.rounded.as_deref_mut(),
            exp_avg: &mut self.exp_avg,
            exp_avg_sq: &mut self.exp_avg_sq,
        }
    }
}

/// A weight that moves while its gradient is multiplied out ends where the written gradient would move it.
fn steps_with_products<X: Element + PartialEq, S: Element + PartialEq>(with_rounded: bool) {
    let dims = [SIZES[2], SIZES[5], ExpertDims { tokens: 40, top_k: 2, experts: 3, hidden: 2085, inter: 40 }];
    for dims in dims {
        let case = Case::<X, X, i32>::new(dims, |i| i as i32);
        let (input, kept) = (case.input(Activation::Silu), case.kept(Activation::Silu));
        let (mut got, mut want) = (Grads::<X, X>::new(&case), Grads::<X, X>::new(&case));
        moe_experts_backward(&input, &kept, &case.dout, want.all());
        let (dx, dweights) = (Some(&mut got.x[..]), Some(&mut got.weights[..]));
        let deferred = moe_experts_backward_deferring(&input, &kept, &case.dout, dx, dweights);
        assert_eq!((&got.x, &got.weights), (&want.x, &want.weights), "{dims:?}");
        for (gradient, param) in deferred.iter().zip([&case.gate_up, &case.down]) {
            let mut exact = poison::<f32>(param.len());
            gradient.write(&mut exact);
            let full: Vec<f32> = param.iter().map(|x| x.to_f32()).collect();
            if with_rounded {
                compare_step(gradient, &exact, Weight::<f32, S>::new(&full, true));
            } else {
                compare_step(gradient, &exact, Weight::<X, S>::new(param, false));
            }
        }
    }
}

fn compare_step<X: Element, V: Element + PartialEq, S: Element + PartialEq>(
    gradient: &DeferredGradient<X>,
    exact: &[f32],
    weight: Weight<V, S>,
) {
    let (mut got, mut want) = (weight.clone(), weight);
    gradient.step(&HYPER, 3, got.all());
    let AdamWWeight { param, rounded, exp_avg, exp_avg_sq } = want.all();
    adamw_step(&HYPER, 3, AdamWState { param: &mut *param, grad: exact, exp_avg, exp_avg_sq });
    if let Some(rounded) = rounded {
        rounded.iter_mut().zip(param).for_each(|(rounded, x)| *rounded = bf16::from_f32(x.to_f32()));
    }
    assert!(got == want);
    let (square, want) = (gradient.square(), exact.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>());
    assert!((square - want).abs() <= 1e-5 * want, "{square} is not {want}");
}

#[test]
fn weights_move_while_their_gradients_are_multiplied_out() {
    on_each_isa(|_| {
        steps_with_products::<f32, f32>(false);
        steps_with_products::<bf16, f32>(true);
        steps_with_products::<bf16, bf16>(true);
        steps_with_products::<bf16, bf16>(false);
    });
}

#[test]
fn the_square_of_a_gradient_that_is_not_finite_is_not_finite() {
    on_each_isa(|_| {
        for spoiled in [f32::INFINITY, f32::NAN] {
            let mut case = Case::<f32, f32, i32>::new(SIZES[2], |i| i as i32);
            let kept = case.kept(Activation::Silu);
            case.dout[5] = spoiled;
            let input = case.input(Activation::Silu);
            let deferred = moe_experts_backward_deferring(&input, &kept, &case.dout, None, None);
            assert!(deferred.iter().all(|gradient| !gradient.square().is_finite()));
        }
    });
}

#[test]
fn gradients_not_asked_for_change_nothing() {
    let case = Case::<f32, f32, i32>::new(SIZES[2], |i| i as i32);
    let (input, kept) = (case.input(Activation::Silu), case.kept(Activation::Silu));
    let mut all = Grads::new(&case);
    moe_experts_backward(&input, &kept, &case.dout, all.all());
    let mut some = Grads::new(&case);
    moe_experts_backward(
        &input,
        &kept,
        &case.dout,
        ExpertGrads { x: Some(&mut some.x), weights: Some(&mut some.weights), gate_up: None, down: None },
    );
    assert_eq!(all.x, some.x);
    assert_eq!(all.weights, some.weights);
}

#[test]
fn no_tokens() {
    let dims = ExpertDims { tokens: 0, top_k: 2, experts: 3, hidden: 4, inter: 5 };
    let case = Case::<f32, f32, i32>::new(dims, |i| i as i32);
    let mut grads = Grads::new(&case);
    moe_experts(&case.input(Activation::Silu), &mut []);
    moe_experts_backward(&case.input(Activation::Silu), &[], &case.dout, grads.all());
    assert!(grads.gate_up.iter().chain(&grads.down).all(|g| *g == 0.0));
}

#[test]
#[should_panic(expected = "is not in 0..")]
fn bad_index_is_refused() {
    let mut case = Case::<f32, f32, i32>::new(SIZES[1], |i| i as i32);
    case.indices[1] = 5;
    moe_experts(&case.input(Activation::Silu), &mut poison(33));
}

#[test]
fn results_do_not_depend_on_threads() {
    let case = Case::<bf16, bf16, i32>::new(SIZES[5], |i| i as i32);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let mut out = poison::<bf16>(case.x.len());
            moe_experts(&case.input(Activation::Silu), &mut out);
            let mut grads = Grads::new(&case);
            let kept = case.kept(Activation::Silu);
            let input = case.input(Activation::Silu);
            moe_experts_backward(&input, &kept, &case.dout, grads.all());
            let [gate_up, _] = moe_experts_backward_deferring(&input, &kept, &case.dout, None, None);
            let mut weight = Weight::<bf16, bf16>::new(&case.gate_up, false);
            gate_up.step(&HYPER, 3, weight.all());
            (out, grads.x, grads.weights, grads.gate_up, grads.down, weight, gate_up.square())
        })
    };
    assert!(run(1) == run(3));
}

/// Every expert's product by the plain matrix product, with idle experts between used ones.
fn grouped<T: Element>() {
    let mut random = Random::new(21);
    for (inputs, outputs, offsets) in [
        (7, 5, vec![0, 3, 3, 4, 30]),
        (64, 33, vec![0, 0, 40, 41, 41]),
        (3, 70, vec![0, 1, 2, 2, 3]),
        (5, 2, vec![0; 5]),
    ] {
        let dims = GroupedLinearDims { experts: 4, inputs, outputs };
        let rows = offsets[4];
        let x = random.values::<T>(rows * inputs, 1.0);
        let weight = random.values::<T>(4 * outputs * inputs, 1.0);
        let dy = random.values::<T>(rows * outputs, 1.0);
        let (mut y, mut dx) = (poison::<T>(rows * outputs), poison::<T>(rows * inputs));
        let mut dweight = poison::<T>(weight.len());
        grouped_linear(dims, &offsets, &x, &weight, &mut y);
        grouped_linear_backward_input(dims, &offsets, &dy, &weight, &mut dx);
        grouped_linear_backward_weight(dims, &offsets, &dy, &x, &mut dweight);
        let (mut want_y, mut want_dx) = (poison::<T>(y.len()), poison::<T>(dx.len()));
        let mut want_dweight = vec![T::default(); weight.len()];
        for expert in 0..4 {
            let at = offsets[expert]..offsets[expert + 1];
            let matrix = expert * outputs * inputs..(expert + 1) * outputs * inputs;
            let (x_rows, y_rows) = (at.start * inputs..at.end * inputs, at.start * outputs..at.end * outputs);
            let (x, dy, w) = (&x[x_rows.clone()], &dy[y_rows.clone()], &weight[matrix.clone()]);
            let product = |m, n, k, a, b, c: &mut [T]| {
                let c = MatrixMut { data: c, row_stride: n };
                reference::gemm(GemmDims { m, n, k }, a, b, c, false);
            };
            let (x, dy_rows) = (Matrix::rows(x, inputs), Matrix::rows(dy, outputs));
            product(at.len(), outputs, inputs, x, Matrix::transposed(w, inputs), &mut want_y[y_rows]);
            product(at.len(), inputs, outputs, dy_rows, Matrix::rows(w, inputs), &mut want_dx[x_rows]);
            let dy = Matrix::transposed(dy, outputs);
            product(outputs, inputs, at.len(), dy, x, &mut want_dweight[matrix]);
        }
        assert_close("grouped y", &y, &want_y, tolerance::<T>());
        assert_close("grouped dx", &dx, &want_dx, tolerance::<T>());
        assert_close("grouped dweight", &dweight, &want_dweight, tolerance::<T>());
    }
}

#[test]
fn grouped_linears_are_the_linears_of_their_experts() {
    on_each_isa(|_| {
        grouped::<f32>();
        grouped::<bf16>();
    });
}
