//! Plain attention with whole rows of scores.
use crate::{Attention, AttentionDims, AttentionGrads, Element, LatentAttention};

/// See [`crate::attention`].
pub fn attention<T: Element>(input: &Attention<'_, T>, out: &mut [T], lse: &mut [f32]) {
    out.fill(T::default());
    lse.fill(f32::NEG_INFINITY);
    for_each_query(input, |query| {
        let Some(softmax) = query.softmax(input) else { return };
        lse[query.index] = softmax.lse as f32;
        for (i, out) in
            out[query.index * input.dims.value_dim..][..input.dims.value_dim].iter_mut().enumerate()
        {
            let sum = query
                .keys
                .clone()
                .zip(&softmax.probabilities)
                .map(|(key, p)| p * value(input, &query, key, i));
            *out = T::from_f32(sum.sum::<f64>() as f32);
        }
    });
}

/// See [`crate::attention_backward`]; needs nothing of the forward pass.
pub fn attention_backward<T: Element>(input: &Attention<'_, T>, dout: &[T], grads: AttentionGrads<'_, T>) {
    let d = input.dims;
    let mut dq = vec![0.0f64; grads.q.len()];
    let mut dk = vec![0.0f64; grads.k.len()];
    let mut dv = vec![0.0f64; grads.v.len()];
    for_each_query(input, |query| {
        let Some(softmax) = query.softmax(input) else { return };
        let dout = &dout[query.index * d.value_dim..][..d.value_dim];
        let dp: Vec<f64> = query
            .keys
            .clone()
            .map(|key| {
                let terms = dout.iter().enumerate();
                terms.map(|(i, g)| f64::from(g.to_f32()) * value(input, &query, key, i)).sum()
            })
            .collect();
        let mean: f64 = dp.iter().zip(&softmax.probabilities).map(|(dp, p)| dp * p).sum();
        for ((key, p), dp) in query.keys.clone().zip(&softmax.probabilities).zip(&dp) {
            let row = key * d.kv_heads + query.kv_head;
            for (i, g) in dout.iter().enumerate() {
                dv[row * d.value_dim + i] += p * f64::from(g.to_f32());
            }
            let ds = p * (dp - mean) * f64::from(input.scale);
            for i in 0..d.head_dim {
                let q = f64::from(input.q[query.q_start + i].to_f32());
                let k = f64::from(input.k[key * d.k_stride + query.kv_head * d.head_dim + i].to_f32());
                dq[query.index * d.head_dim + i] += ds * k;
                dk[row * d.head_dim + i] += ds * q;
            }
        }
    });
    for (target, sums) in [(grads.q, dq), (grads.k, dk), (grads.v, dv)] {
        for (target, sum) in target.iter_mut().zip(sums) {
            *target = T::from_f32(sum as f32);
        }
    }
}

/// See [`crate::latent_attention`]: keys and values of all heads are expanded, and nothing is rounded on the way.
pub fn latent_attention<T: Element>(input: &LatentAttention<'_, T>, out: &mut [T]) {
    let d = input.dims;
    let slots = input.segments.iter().map(|s| s.k.end).max().unwrap_or(0);
    let (mut k, mut v) = (Vec::new(), Vec::new());
    for slot in 0..slots {
        let latent = &input.latents[slot * d.latent_stride..][..d.rank + d.rope];
        for head in 0..d.heads {
            for row in 0..d.nope + d.value_dim {
                let weights = &input.kv_b[(head * (d.nope + d.value_dim) + row) * d.rank..][..d.rank];
                let sum = weights.iter().zip(latent).map(|(w, x)| w.to_f32() * x.to_f32()).sum::<f32>();
                if row < d.nope { k.push(sum) } else { v.push(sum) }
            }
            k.extend(latent[d.rank..].iter().map(|x| x.to_f32()));
        }
    }
    let q: Vec<f32> = input.q.iter().map(|x| x.to_f32()).collect();
    let dims = AttentionDims::contiguous(d.heads, d.heads, d.nope + d.rope, d.value_dim);
    let expanded = Attention { dims, q: &q, k: &k, v: &v, segments: input.segments, scale: input.scale };
    let mut sums = vec![0.0; out.len()];
    attention(&expanded, &mut sums, &mut vec![0.0; out.len() / d.value_dim.max(1)]);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = T::from_f32(sum);
    }
}

struct Query {
    /// `row * heads + head`.
    index: usize,
    q_start: usize,
    kv_head: usize,
    keys: std::ops::Range<usize>,
}

struct Softmax {
    probabilities: Vec<f64>,
    lse: f64,
}

impl Query {
    fn softmax<T: Element>(&self, input: &Attention<'_, T>) -> Option<Softmax> {
        let d = input.dims;
        let score = |key: usize| -> f64 {
            let k = &input.k[key * d.k_stride + self.kv_head * d.head_dim..][..d.head_dim];
            let q = &input.q[self.q_start..][..d.head_dim];
            let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32())).sum();
            dot * f64::from(input.scale)
        };
        let scores: Vec<f64> = self.keys.clone().map(score).collect();
        let max = scores.iter().copied().reduce(f64::max)?;
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let probabilities = scores.iter().map(|s| (s - max).exp() / sum).collect();
        Some(Softmax { probabilities, lse: max + sum.ln() })
    }
}

fn value<T: Element>(input: &Attention<'_, T>, query: &Query, key: usize, i: usize) -> f64 {
    f64::from(input.v[key * input.dims.v_stride + query.kv_head * input.dims.v_head_stride + i].to_f32())
}

fn for_each_query<T>(input: &Attention<'_, T>, mut visit: impl FnMut(Query)) {
    let d = input.dims;
    for segment in input.segments {
        for (i, row) in segment.q.clone().enumerate() {
            let last = match segment.causal {
                Some(offset) => segment.k.end.min((segment.k.start + i + 1).saturating_add_signed(offset)),
                None => segment.k.end,
            };
            for head in 0..d.heads {
                visit(Query {
                    index: row * d.heads + head,
                    q_start: row * d.q_stride + head * d.head_dim,
                    kv_head: head / (d.heads / d.kv_heads),
                    keys: segment.k.start..last.max(segment.k.start),
                });
            }
        }
    }
}
