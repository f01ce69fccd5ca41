//! Plain step of a decoded token, in `f64` from weights made dense.
use super::experts::activate;
use super::{choose_experts, routing_weights};
use crate::{DecodeLayer, DecodeNorm, DecodeToken, DecodeWeight, Element, StackDims, bf16};

/// See [`crate::decode_head`]: nothing is rounded.
pub fn decode_head(norm_weight: &DecodeNorm, lm_head: &DecodeWeight, x: &[bf16], logits: &mut [f32]) {
    let x: Vec<f64> = x.iter().map(wide).collect();
    let sums = multiply(lm_head, 0, &norm(norm_weight, &x));
    logits.iter_mut().zip(sums).for_each(|(logit, sum)| *logit = sum as f32);
}

/// See [`crate::decode_layer`]: nothing is rounded between input and output.
pub fn decode_layer(layer: &DecodeLayer, token: &DecodeToken<'_>, out: &mut [bf16], own: &mut [bf16]) {
    let d = layer.self_attn.dims;
    let (head_dim, width) = (d.nope + d.rope, d.rank + d.rope);
    let x: Vec<f64> = token.x.iter().map(wide).collect();
    let normed = norm(&layer.input_layernorm, &x);

    let attn = &layer.self_attn;
    let q_input = match &attn.q_a {
        Some((q_a, q_norm)) => norm(q_norm, &multiply(q_a, 0, &normed)),
        None => normed.clone(),
    };
    let mut q = multiply(&attn.q, 0, &q_input);
    for head in q.chunks_exact_mut(head_dim) {
        rotate(token, d.interleaved, &mut head[d.nope..]);
        head.iter_mut().for_each(|x| *x *= f64::from(token.rotary.query_scale));
    }
    let mut slot = multiply(&attn.kv_a_proj_with_mqa, 0, &normed);
    let latent = norm(&attn.kv_a_layernorm, &slot[..d.rank]);
    slot[..d.rank].copy_from_slice(&latent);
    rotate(token, d.interleaved, &mut slot[d.rank..]);

    let mut slots: Vec<Vec<f64>> =
        token.cached.chunks_exact(width).map(|slot| slot.iter().map(wide).collect()).collect();
    slots.push(slot.clone());
    let kv_b: Vec<f64> = token.kv_b.iter().map(wide).collect();
    let mut attended = Vec::new();
    for (head, q) in q.chunks_exact(head_dim).enumerate() {
        let rows = &kv_b[head * (d.nope + d.value_dim) * d.rank..][..(d.nope + d.value_dim) * d.rank];
        let expand = |slot: &[f64]| -> Vec<f64> {
            rows.chunks_exact(d.rank).map(|row| dot(row, &slot[..d.rank])).collect()
        };
        let expanded: Vec<Vec<f64>> = slots.iter().map(|slot| expand(slot)).collect();
        let scores = expanded.iter().zip(&slots).map(|(kv, slot)| {
            f64::from(d.scale) * (dot(&q[..d.nope], &kv[..d.nope]) + dot(&q[d.nope..], &slot[d.rank..]))
        });
        let scores: Vec<f64> = scores.collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        attended.extend((0..d.value_dim).map(|i| {
            let weighed =
                scores.iter().zip(&expanded).map(|(score, kv)| (score - max).exp() * kv[d.nope + i]);
            weighed.sum::<f64>() / total
        }));
    }
    let x = add(&x, &multiply(&attn.o_proj, 0, &attended));

    let normed = norm(&layer.post_attention_layernorm, &x);
    let gated = |gate: Vec<f64>, up: Vec<f64>| -> Vec<f64> {
        gate.iter().zip(up).map(|(gate, up)| activate(layer.activation, *gate).0 * up).collect()
    };
    let mlp = &layer.mlp;
    let inner = gated(multiply(&mlp.gate_proj, 0, &normed), multiply(&mlp.up_proj, 0, &normed));
    let mut y = add(&x, &multiply(&mlp.down_proj, 0, &inner));
    if let Some(experts) = &layer.experts {
        let logits: Vec<f32> = multiply(&experts.gate, 0, &normed).iter().map(|x| *x as f32).collect();
        let top_k = experts.router.top_k;
        let (mut indices, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
        choose_experts(experts.router, &logits, &experts.e_score_correction_bias, &mut indices);
        routing_weights(experts.router, &logits, &indices, &mut weights);
        for (expert, weight) in indices.iter().zip(weights) {
            let [gate, up] = gate_up(&experts.gate_up_proj, *expert as usize, &normed);
            let down = multiply(&experts.down_proj, *expert as usize, &gated(gate, up));
            y.iter_mut().zip(down).for_each(|(y, down)| *y += f64::from(weight) * down);
        }
    }
    for (to, from) in out.iter_mut().zip(y).chain(own.iter_mut().zip(slot)) {
        *to = Element::from_f32(from as f32);
    }
}

fn wide(x: &bf16) -> f64 {
    f64::from(Element::to_f32(*x))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn norm(norm: &DecodeNorm, x: &[f64]) -> Vec<f64> {
    let rstd = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(norm.eps)).sqrt();
    x.iter().zip(&norm.weight).map(|(x, weight)| x * rstd * f64::from(*weight)).collect()
}

fn rotate(token: &DecodeToken<'_>, interleaved: bool, x: &mut [f64]) {
    let half = x.len() / 2;
    let from = x.to_vec();
    for i in 0..half {
        let (a, b) = if interleaved { (from[2 * i], from[2 * i + 1]) } else { (from[i], from[i + half]) };
        let (cos, sin) = (f64::from(token.rotary.cos[i]), f64::from(token.rotary.sin[i]));
        (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}

/// The values of one matrix of a stack.
fn dense(weight: &DecodeWeight, matrix: usize) -> (StackDims, Vec<f64>) {
    match weight {
        DecodeWeight::Packed(weight) => {
            let dims = weight.dims();
            let mut values = vec![bf16::ZERO; dims.rows * dims.columns];
            weight.unpack(matrix, &mut values);
            (dims, values.iter().map(wide).collect())
        }
        DecodeWeight::Quantized(weight) => {
            let dims = weight.dims();
            let at = |i: usize| f64::from(weight.value(matrix, i / dims.columns, i % dims.columns));
            (dims, (0..dims.rows * dims.columns).map(at).collect())
        }
    }
}

fn multiply(weight: &DecodeWeight, matrix: usize, x: &[f64]) -> Vec<f64> {
    let (dims, values) = dense(weight, matrix);
    values.chunks_exact(dims.columns).map(|row| dot(row, x)).collect()
}

fn gate_up(weight: &DecodeWeight, expert: usize, x: &[f64]) -> [Vec<f64>; 2] {
    match weight {
        DecodeWeight::Packed(_) => {
            let mut gate = multiply(weight, expert, x);
            let up = gate.split_off(gate.len() / 2);
            [gate, up]
        }
        DecodeWeight::Quantized(_) => [0, 1].map(|part| multiply(weight, 2 * expert + part, x)),
    }
}
