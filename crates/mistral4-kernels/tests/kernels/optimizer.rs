//! AdamW and gradient sums against plain twins.
use crate::support::{Random, assert_close, on_each_isa, tolerance};
use mistral4_kernels::{
    AdamW, AdamWState, Element, adamw_step, adamw_step_master, bf16, reference, scale, sum_of_squares,
};

const HYPER: AdamW =
    AdamW { lr: 3e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, grad_scale: 0.5 };

fn steps<P: Element, G: Element, S: Element>() {
    let len = 1027;
    let mut random = Random::new(1);
    let mut got = (random.values::<P>(len, 1.0), vec![S::default(); len], vec![S::default(); len]);
    let mut want = got.clone();
    for step in 1..=5 {
        let grad = random.values::<G>(len, 1.0);
        let state = |s: &mut (Vec<P>, Vec<S>, Vec<S>), f: &dyn Fn(AdamWState<'_, P, G, S>)| {
            let (param, exp_avg, exp_avg_sq) = (&mut s.0[..], &mut s.1[..], &mut s.2[..]);
            f(AdamWState { param, grad: &grad, exp_avg, exp_avg_sq });
        };
        state(&mut got, &|s| adamw_step(&HYPER, step, s));
        state(&mut want, &|s| reference::adamw_step(&HYPER, step, s));
    }
    assert_close("param", &got.0, &want.0, tolerance::<P>().max(tolerance::<S>()));
    assert_close("exp_avg", &got.1, &want.1, tolerance::<S>());
    assert_close("exp_avg_sq", &got.2, &want.2, tolerance::<S>());
}

#[test]
fn adamw_steps() {
    on_each_isa(|_| {
        steps::<f32, f32, f32>();
        steps::<f32, bf16, bf16>();
        steps::<bf16, bf16, f32>();
    });
}

/// Three steps of `torch.optim.AdamW` (torch 2.15) on one parameter.
#[test]
fn adamw_is_torchs() {
    let hyper = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, grad_scale: 1.0 };
    let (mut p, mut m, mut v) = ([1.0f32, -2.0], [0.0f32; 2], [0.0f32; 2]);
    for (step, grad) in [[0.5f32, -1.0], [0.25, 2.0], [-3.0, 0.0]].iter().enumerate() {
        let state = AdamWState { param: &mut p, grad, exp_avg: &mut m, exp_avg_sq: &mut v };
        adamw_step(&hyper, step as u64 + 1, state);
    }
    assert_close("param", &p, &[0.853_691_94, -1.959_079_6], 1e-6);
}

#[test]
fn master_weights_keep_small_steps() {
    let hyper = AdamW { lr: 1e-4, weight_decay: 0.0, ..HYPER };
    let mut rounded = vec![bf16::from_f32(1.0); 40];
    let (mut master, mut m, mut v) = (vec![1.0f32; 40], vec![0.0f32; 40], vec![0.0f32; 40]);
    for step in 1..=30 {
        let state = AdamWState {
            param: &mut master[..],
            grad: &[1.0f32; 40],
            exp_avg: &mut m[..],
            exp_avg_sq: &mut v[..],
        };
        adamw_step_master(&hyper, step, &mut rounded, state);
    }
    assert!((master[0] - 0.997).abs() < 1e-4, "{}", master[0]);
    assert!(rounded.iter().zip(&master).all(|(r, m)| *r == bf16::from_f32(*m)));
}

#[test]
fn sums_and_scales() {
    on_each_isa(|_| {
        let mut values = Random::new(5).values::<f32>(100_003, 1.0);
        let want: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
        assert!((sum_of_squares(&values) / want - 1.0).abs() < 1e-6);
        let before = values.clone();
        scale(&mut values, 0.25);
        assert!(values.iter().zip(before).all(|(a, b)| *a == b * 0.25));
        assert_eq!(sum_of_squares::<f32>(&[]), 0.0);
    });
}
