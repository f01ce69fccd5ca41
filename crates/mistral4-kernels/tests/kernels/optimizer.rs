//! AdamW and gradient sums against plain twins.
use crate::support::{Random, assert_close, on_each_isa, tolerance};
use mistral4_kernels::{
    AdamW, AdamW8bitState, AdamWState, BLOCK_8BIT, DynamicMap, Element, Quantized8bit, adamw_step,
    adamw_step_8bit, adamw_step_master, bf16, reference, scale, sum_of_squares,
};

pub(crate) const HYPER: AdamW = AdamW {
    lr: 3e-3,
    beta1: 0.9,
    beta2: 0.95,
    eps: 1e-8,
    weight_decay: 0.1,
    decoupled_weight_decay: true,
    grad_scale: 0.5,
};
const ADAM: AdamW = AdamW { decoupled_weight_decay: false, ..HYPER };

fn steps<P: Element, G: Element, S: Element>(hyper: AdamW) {
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
        state(&mut got, &|s| adamw_step(&hyper, step, s));
        state(&mut want, &|s| reference::adamw_step(&hyper, step, s));
    }
    // What is bf16 may be rounded the other way, by twice what rounding to nearest may be off.
    let most = if S::IS_BF16 || P::IS_BF16 { 3.0 * tolerance::<bf16>() } else { tolerance::<f32>() };
    assert_close("param", &got.0, &want.0, most);
    assert_close("exp_avg", &got.1, &want.1, most);
    assert_close("exp_avg_sq", &got.2, &want.2, most);
}

#[test]
fn adamw_steps() {
    on_each_isa(|_| {
        for hyper in [HYPER, ADAM] {
            steps::<f32, f32, f32>(hyper);
            steps::<f32, bf16, bf16>(hyper);
            steps::<bf16, bf16, f32>(hyper);
        }
    });
}

/// A change of 1/1000 a step is lost when bf16 is rounded to nearest.
#[test]
fn bf16_moments_follow_slow_changes() {
    let hyper = AdamW { beta2: 0.999, grad_scale: 1.0, ..HYPER };
    let len = 4096;
    let (mut param, grad) = (vec![0.0f32; len], vec![1.0f32; len]);
    let (mut m, mut v) = (vec![bf16::ZERO; len], vec![bf16::from_f32(1.5); len]);
    for step in 1..=1000 {
        let state = AdamWState { param: &mut param, grad: &grad, exp_avg: &mut m, exp_avg_sq: &mut v };
        adamw_step(&hyper, step, state);
    }
    let mean = v.iter().map(|v| f64::from(v.to_f32())).sum::<f64>() / len as f64;
    let want = 1.0 + 0.5 * 0.999f64.powi(1000);
    assert!((mean - want).abs() < 2e-3, "{mean} is not {want}");
}

/// Moments in 8 bits: codes and largest magnitudes.
fn moments(map: DynamicMap, len: usize) -> (Vec<u8>, Vec<f32>) {
    (vec![map.zero(); len], vec![0.0; len.div_ceil(BLOCK_8BIT)])
}

#[test]
fn maps_are_those_of_the_reference() {
    for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
        let want = reference::dynamic_map(map);
        let got = map.fractions();
        assert_eq!(want.len(), 256);
        assert_close("fractions", got, &want, 1e-7);
        assert!(got.is_sorted());
        assert_eq!((got[map.zero() as usize], got[255]), (0.0, 1.0));
    }
}

/// One step at a time from the same moments, since a code on the edge between two may fall either way.
#[test]
fn adamw_8bit_steps() {
    let len = 3 * BLOCK_8BIT + 57;
    on_each_isa(|isa| {
        let mut random = Random::new(9);
        let mut param = random.values::<f32>(len, 1.0);
        let (mut m, mut v) = (moments(DynamicMap::Signed, len), moments(DynamicMap::Unsigned, len));
        for step in 1..=6 {
            let mut grad = random.values::<f32>(len, 1.0);
            // Seven orders of magnitude, and a block without any gradient.
            grad.iter_mut().enumerate().for_each(|(i, g)| *g *= 10f32.powi(-((i % 8) as i32)));
            grad[BLOCK_8BIT..2 * BLOCK_8BIT].fill(0.0);
            let hyper = AdamW { weight_decay: 0.0, ..HYPER };
            let mut want = (
                param.clone(),
                reference::dequantize(DynamicMap::Signed, &m.0, &m.1),
                reference::dequantize(DynamicMap::Unsigned, &v.0, &v.1),
            );
            let (exp_avg, exp_avg_sq) = (&mut want.1[..], &mut want.2[..]);
            let state = AdamWState { param: &mut want.0[..], grad: &grad[..], exp_avg, exp_avg_sq };
            reference::adamw_step(&hyper, step, state);
            let mut rounded = vec![bf16::ZERO; len];
            adamw_step_8bit(
                &hyper,
                step,
                AdamW8bitState {
                    param: &mut param,
                    rounded: Some(&mut rounded),
                    grad: &grad,
                    exp_avg: Quantized8bit { codes: &mut m.0, absmax: &mut m.1 },
                    exp_avg_sq: Quantized8bit { codes: &mut v.0, absmax: &mut v.1 },
                },
            );
            assert_close("param", &param, &want.0, 1e-6);
            assert!(rounded.iter().zip(&param).all(|(r, p)| *r == bf16::from_f32(*p)));
            for (map, got, want) in [(DynamicMap::Signed, &m, &want.1), (DynamicMap::Unsigned, &v, &want.2)] {
                let (codes, absmax) = reference::quantize(map, want);
                assert_close("absmax", &got.1, &absmax, 1e-6);
                let differ = got.0.iter().zip(&codes).filter(|(a, b)| a != b);
                assert!(differ.clone().all(|(a, b)| a.abs_diff(*b) == 1), "{isa:?} {map:?}");
                assert!(differ.count() <= 2, "{isa:?} {map:?}");
            }
        }
        assert!(v.0[..BLOCK_8BIT].iter().all(|&code| code > 0), "no second moment became 0");
        assert!(v.0[BLOCK_8BIT..2 * BLOCK_8BIT].iter().all(|&code| code == 0));
    });
}

/// Three steps of `torch.optim.AdamW` (torch 2.15) on one parameter.
#[test]
fn adamw_is_torchs() {
    let hyper = AdamW { lr: 0.1, beta2: 0.999, weight_decay: 0.01, grad_scale: 1.0, ..HYPER };
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
