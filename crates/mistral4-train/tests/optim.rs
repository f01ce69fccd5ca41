//! Optimizers: Muon against torch, shards against whole parameters, states that are smaller.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::bf16;
use mistral4::checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::InitialSource;
use mistral4::{Mistral4, ModelInputs};
use mistral4_train::backward::{
    Activations, Gradients, LabelledInputs, LossScale, forward_backward, forward_backward_for,
};
use mistral4_train::optim::{Optimizer, ParameterState, StepFactors, Values};
use mistral4_train::recipe::{
    AdjustLr, MuonConfig, NewtonSchulzDtype, OptimizerConfig, OptimizerKind, StateDtype,
};
use safetensors::SafeTensors;

const FACTORS: StepFactors = StepFactors { lr: 1e-2, weight_decay: 0.1, grad_scale: 0.5 };

fn config(state_dtype: StateDtype) -> OptimizerConfig {
    OptimizerConfig { state_dtype, min_8bit_size: 0, ..OptimizerConfig::default() }
}

/// Numbers in -1..1 that look random.
fn numbers(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Every tensor of a state, as bytes.
fn bytes(state: &ParameterState) -> BTreeMap<&'static str, Vec<u8>> {
    state.tensors().into_iter().map(|(name, tensor)| (name, tensor.to_data().as_bytes().to_vec())).collect()
}

#[test]
fn muon_follows_torch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/training/muon.safetensors");
    let file = std::fs::read(path).unwrap();
    let golden = SafeTensors::deserialize(&file).unwrap();
    let read = |name: &str| -> (Vec<usize>, Vec<f32>) {
        let view = golden.tensor(name).unwrap();
        let values = view.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
        (view.shape().to_vec(), values.collect())
    };
    let muon = |nesterov, adjust_lr, newton_schulz_dtype| MuonConfig {
        mu: 0.95,
        nesterov,
        adjust_lr: Some(adjust_lr),
        epsilon: 1e-8,
        newton_schulz_dtype,
        scalar_lr: None,
        embed_lr: None,
        lm_head_lr: None,
    };
    let factors = StepFactors { lr: 2e-2, weight_decay: 0.1, grad_scale: 1.0 };
    for (variant, muon, tolerance) in [
        ("spectral", muon(false, AdjustLr::SpectralNorm, NewtonSchulzDtype::F32), 1e-4),
        ("nesterov_rms", muon(true, AdjustLr::RmsNorm, NewtonSchulzDtype::F32), 1e-4),
        ("bf16", muon(false, AdjustLr::SpectralNorm, NewtonSchulzDtype::Bf16), 2e-2),
    ] {
        let mut compared = 0;
        for name in golden.names() {
            let Some(key) = name.strip_prefix(&format!("{variant}/")) else { continue };
            let Some(key) = key.strip_suffix("/initial") else { continue };
            let config =
                OptimizerConfig { lr: factors.lr, muon: Some(muon.clone()), ..config(StateDtype::F32) };
            let mut optimizer = Optimizer::new(config);
            let (shape, values) = read(name);
            let tensor = |values: Vec<f32>| {
                let count = values.len();
                Tensor::<1>::from_data(TensorData::new(values, [count]), (&Device::flex(), DType::F32))
            };
            let mut values = tensor(values);
            for step in 0..10 {
                let (_, gradient) = read(&format!("{variant}/{key}/gradient{step}"));
                optimizer.begin_step();
                values = optimizer.update(key, &shape, values, tensor(gradient), factors);
            }
            let got = values.into_data();
            let (_, want) = read(&format!("{variant}/{key}/final"));
            let largest = want.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            for (got, want) in got.as_slice::<f32>().unwrap().iter().zip(&want) {
                assert!((got - want).abs() <= tolerance * largest, "{variant} {key}: {got} is not {want}");
            }
            compared += 1;
        }
        assert_eq!(compared, 8, "{variant}");
    }
}

/// FSDP updates flat shards; 8-bit blocks and Adam's elements do not notice.
#[test]
fn shards_move_like_the_whole() {
    let (key, shape) = ("model.layers.0.self_attn.o_proj.weight", [40, 64]);
    for (kind, state_dtype) in [
        (OptimizerKind::AdamW, StateDtype::F32),
        (OptimizerKind::Adam, StateDtype::F32),
        (OptimizerKind::AdamW, StateDtype::Int8),
    ] {
        let config = OptimizerConfig { kind, ..config(state_dtype) };
        let mut whole = Optimizer::new(config.clone());
        let mut parts = [Optimizer::new(config.clone()), Optimizer::new(config)];
        let mut values = numbers(1, 2560);
        let mut shards = values.clone();
        for step in 0..4 {
            let gradient = numbers(step + 2, 2560);
            whole.begin_step();
            whole.update_slice(key, &shape, Values::F32(&mut values), &gradient, FACTORS);
            let (left, right) = shards.split_at_mut(1280);
            for ((part, shard), gradient) in
                parts.iter_mut().zip([left, right]).zip(gradient.chunks_exact(1280))
            {
                part.begin_step();
                part.update_slice(key, &shape, Values::F32(shard), gradient, FACTORS);
            }
        }
        assert_eq!(values, shards, "{kind:?} {state_dtype:?}");
        let [left, right] = parts.map(|part| bytes(&part.state().parameters[key]));
        for (name, bytes) in bytes(&whole.state().parameters[key]) {
            assert!(bytes == [&left[name][..], &right[name][..]].concat(), "{name}");
        }
    }
}

#[test]
fn bf16_values_are_rounded_from_what_is_remembered() {
    for state_dtype in [StateDtype::F32, StateDtype::Bf16, StateDtype::Int8] {
        let mut optimizer = Optimizer::new(config(state_dtype));
        let mut values: Vec<bf16> = numbers(3, 1000).into_iter().map(bf16::from_f32).collect();
        let before = values.clone();
        for step in 0..3 {
            optimizer.begin_step();
            let factors = StepFactors { lr: 1e-4, ..FACTORS };
            optimizer.update_slice("w", &[1000], Values::Bf16(&mut values), &numbers(step, 1000), factors);
        }
        let state = &optimizer.state().parameters["w"];
        let master = state.master.as_ref().unwrap().to_data();
        let master = master.as_slice::<f32>().unwrap();
        assert!(values.iter().zip(master).all(|(value, master)| *value == bf16::from_f32(*master)));
        assert!(master.iter().zip(&before).all(|(master, before)| *master != before.to_f32()));
    }
}

/// The tiny preset, text only, and a batch with a rule to learn.
fn model_and_batch(dtype: weights::DType) -> (Mistral4, LabelledInputs) {
    model_and_tokens(dtype, 48)
}

fn model_and_tokens(dtype: weights::DType, tokens: u32) -> (Mistral4, LabelledInputs) {
    let config = ConfigFile::preset("tiny", &ConfigOptions::default()).unwrap().text_only().config;
    let source = InitialSource::new(&config, 5, dtype);
    let model = Mistral4::new(&config, MoeOptions::default(), &source, &Device::flex()).unwrap();
    let ids: Vec<u32> = (0..tokens).map(|i| 20 + i * 7 % 30).collect();
    let labels = ids.iter().skip(1).map(|&id| i64::from(id)).chain([-100]).collect();
    (model, LabelledInputs::plain(ModelInputs::packed(ids, vec![0, tokens as usize]), labels))
}

fn losses(config: OptimizerConfig, dtype: weights::DType, steps: usize) -> Vec<f64> {
    let (mut model, batch) = model_and_batch(dtype);
    let mut optimizer = Optimizer::new(config);
    let scale = LossScale { per_token: 1.0 / 47.0, z_loss: 0.0, aux: 1.0 };
    let mut losses = Vec::new();
    for _ in 0..steps {
        let mut gradients = Gradients::default();
        let measured = forward_backward(&model, &batch, scale, Activations::Kept, &mut gradients).unwrap();
        losses.push(measured.loss_sum / 47.0);
        let factors = StepFactors { lr: 2e-3, weight_decay: 0.0, grad_scale: 1.0 };
        model = optimizer.step(model, gradients, factors);
    }
    losses
}

/// Small states train as well as full ones, f32 parameters and bf16 ones with a master.
#[test]
fn small_states_train_alike() {
    for dtype in [weights::DType::F32, weights::DType::BF16] {
        let full = losses(config(StateDtype::F32), dtype, 12);
        assert!(full[11] < 0.6 * full[0], "{full:?}");
        for state_dtype in [StateDtype::Bf16, StateDtype::Int8] {
            let small = losses(config(state_dtype), dtype, 12);
            for (full, small) in full.iter().zip(&small) {
                assert!((full - small).abs() < 0.05 * full, "{state_dtype:?}: {small} against {full}");
            }
        }
    }
}

/// Without a master, steps far below a bf16 parameter's precision still add up, and a model learns as well.
#[test]
fn bf16_parameters_learn_without_masters() {
    for state_dtype in [StateDtype::F32, StateDtype::Bf16, StateDtype::Int8] {
        let bare = OptimizerConfig { master_weights: false, ..config(state_dtype) };
        let mut optimizer = Optimizer::new(bare.clone());
        let mut values = vec![bf16::ONE; 4096];
        // Each step is 1/8 of half the distance to the next number below 1.
        let factors = StepFactors { lr: 2.0f64.powi(-12), weight_decay: 0.0, grad_scale: 1.0 };
        for _ in 0..64 {
            optimizer.begin_step();
            optimizer.update_slice("w", &[4096], Values::Bf16(&mut values), &vec![1.0f32; 4096], factors);
        }
        assert!(optimizer.state().parameters["w"].master.is_none());
        let mean = values.iter().map(|value| value.to_f32()).sum::<f32>() / 4096.0;
        let want = 1.0 - 64.0 * 2.0f32.powi(-12);
        assert!((mean - want).abs() < 0.1 * (1.0 - want), "{state_dtype:?}: {mean} is not {want}");

        let full = losses(config(state_dtype), weights::DType::BF16, 12);
        let bare = losses(bare, weights::DType::BF16, 12);
        for (full, bare) in full.iter().zip(&bare) {
            assert!((full - bare).abs() < 0.05 * full, "{state_dtype:?}: {bare} against {full}");
        }
    }
}

const EXPERTS: [&str; 2] =
    ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"];

/// Experts that move while their gradients are multiplied out end where written gradients move them.
#[test]
fn products_move_experts_as_their_gradients_do() {
    let tokens = 5;
    let scale = LossScale { per_token: 1.0 / f64::from(tokens), z_loss: 0.0, aux: 1.0 };
    let factors = StepFactors { lr: 2e-3, weight_decay: 0.1, grad_scale: 0.7 };
    for state_dtype in [StateDtype::F32, StateDtype::Bf16, StateDtype::Int8] {
        let [mut written, mut deferred] = [(); 2].map(|()| Optimizer::new(config(state_dtype)));
        let (mut model, batch) = model_and_tokens(weights::DType::F32, tokens);
        let mut other = model.clone();
        for step in 0..3 {
            let (mut all, mut few) = (Gradients::default(), Gradients::default());
            forward_backward(&model, &batch, scale, Activations::Kept, &mut all).unwrap();
            forward_backward_for(&deferred, &other, &batch, scale, Activations::Kept, &mut few).unwrap();
            for key in EXPERTS {
                assert!(all.get(key).is_some());
                assert_eq!(few.get(key).is_some(), state_dtype == StateDtype::Int8, "{key}, {state_dtype:?}");
            }
            let (norm, want) = (few.norm(), all.norm());
            assert!((norm - want).abs() < 1e-6 * want, "{norm} is not {want}");
            model = written.step(model, all, factors);
            other = deferred.step(other, few, factors);
            for (a, b) in model.parameters().iter().zip(other.parameters()) {
                assert_eq!(a.values.to_data(), b.values.to_data(), "{} after step {step}", a.key);
            }
        }
        for (key, state) in &written.state().parameters {
            assert_eq!(bytes(state), bytes(&deferred.state().parameters[key]), "{key}");
        }
    }
}

/// The same of bf16 weights, whose written gradients are rounded: with masters and without.
#[test]
fn products_train_bf16_experts() {
    let tokens = 5;
    let scale = LossScale { per_token: 1.0 / f64::from(tokens), z_loss: 0.0, aux: 1.0 };
    let factors = StepFactors { lr: 2e-3, weight_decay: 0.0, grad_scale: 1.0 };
    for master_weights in [true, false] {
        let config = OptimizerConfig { master_weights, ..config(StateDtype::Bf16) };
        let [written, products] = [false, true].map(|defers| {
            let (mut model, batch) = model_and_tokens(weights::DType::BF16, tokens);
            let mut optimizer = Optimizer::new(config.clone());
            let losses = (0..12).map(|_| {
                let mut gradients = Gradients::default();
                let kept = Activations::Kept;
                let measured = match defers {
                    true => forward_backward_for(&optimizer, &model, &batch, scale, kept, &mut gradients),
                    false => forward_backward(&model, &batch, scale, kept, &mut gradients),
                };
                model = optimizer.step(model.clone(), gradients, factors);
                measured.unwrap().loss_sum
            });
            losses.collect::<Vec<f64>>()
        });
        assert!(products[11] < 0.6 * products[0], "{products:?}");
        for (written, product) in written.iter().zip(&products) {
            assert!((written - product).abs() < 0.05 * written, "{product} against {written}");
        }
    }
}

/// Parameters and states are changed where they lie: no clone of them is made.
#[test]
fn a_step_moves_no_memory() {
    let (model, batch) = model_and_tokens(weights::DType::F32, 5);
    let mut gradients = Gradients::default();
    let scale = LossScale { per_token: 0.2, z_loss: 0.0, aux: 1.0 };
    let mut optimizer = Optimizer::new(config(StateDtype::F32));
    forward_backward_for(&optimizer, &model, &batch, scale, Activations::Kept, &mut gradients).unwrap();
    assert!(gradients.get(EXPERTS[0]).is_none(), "both ways to move a parameter are taken");
    let places = |model: Mistral4| {
        let mut places = BTreeMap::new();
        let model = model.map_parameters(|key, _, values| {
            let (device, dtype) = (values.device(), values.dtype());
            let data = values.into_data();
            places.insert(key.to_owned(), data.as_bytes().as_ptr() as usize);
            Tensor::from_data(data, (&device, dtype))
        });
        (model, places)
    };
    let (model, before) = places(model);
    let norm = gradients.norm();
    assert!(norm > 0.0 && norm == gradients.norm());
    let (_, after) = places(optimizer.step(model, gradients, FACTORS));
    assert_eq!(before, after);
}
