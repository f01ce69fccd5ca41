//! The feed-forward of a decoded token: router, routed experts, shared experts.
use super::DecodeLayer;
use super::weight::{BLOCK, Cut, DecodeWeight, Product, Rows, add_store, with_prepared};
use crate::experts::{Activation, add_scaled, gate_slices};
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::phases::{self, Phase, Tasks};
use crate::quantized::StackDims;
use crate::router::{RouterDims, choose_experts, routing_weights};
use crate::scratch::{self, Scratch};
use half::bf16;
use std::ops::Range;

/// A dense gated feed-forward.
#[derive(Clone, Debug)]
pub struct DecodeMlp {
    /// `[F, D]`
    pub gate_proj: DecodeWeight,
    /// `[F, D]`
    pub up_proj: DecodeWeight,
    /// `[D, F]`
    pub down_proj: DecodeWeight,
}

/// The routed experts with their router.
#[derive(Clone, Debug)]
pub struct DecodeExperts {
    /// How experts are chosen; `tokens` is 1.
    pub router: RouterDims,
    /// The router's weight, `[E, D]`.
    pub gate: DecodeWeight,
    /// `[E]`
    pub e_score_correction_bias: Vec<f32>,
    /// Gate and up of each expert, `[E, 2F, D]`.
    pub gate_up_proj: DecodeWeight,
    /// `[E, D, F]`
    pub down_proj: DecodeWeight,
}

impl DecodeMlp {
    /// F.
    fn inter(&self) -> usize {
        self.gate_proj.dims().rows
    }

    fn check(&self, hidden: usize) {
        let one = |rows, columns| StackDims { matrices: 1, rows, columns };
        let inter = self.inter();
        assert_eq!(self.gate_proj.dims(), one(inter, hidden), "gate_proj is [F, D]");
        assert_eq!(self.up_proj.dims(), one(inter, hidden), "up_proj is [F, D]");
        assert_eq!(self.down_proj.dims(), one(hidden, inter), "down_proj is [D, F]");
    }

    /// `inner = act(gate x) * (up x)` for some blocks.
    fn gated(
        &self,
        isa: Isa,
        activation: Activation,
        blocks: Range<usize>,
        [of_gate, of_up]: [&Rows; 2],
        inner: &mut [f32],
    ) {
        let len = blocks.len() * BLOCK;
        let mut sums = scratch::take::<f32>(2 * len);
        let (gate, up) = sums.split_at_mut(len);
        self.gate_proj.multiply(isa, 0, blocks.clone(), of_gate.row(0), gate);
        self.up_proj.multiply(isa, 0, blocks, of_up.row(0), up);
        gate_slices(isa, activation, gate, up);
        inner.copy_from_slice(&gate[..inner.len()]);
    }
}

impl DecodeExperts {
    /// F.
    fn inter(&self) -> usize {
        self.down_proj.dims().columns
    }

    fn check(&self, hidden: usize) {
        let experts = self.router.experts;
        assert_eq!(self.router.tokens, 1, "one token is routed");
        assert_eq!(
            self.gate.dims(),
            StackDims { matrices: 1, rows: experts, columns: hidden },
            "gate is [E, D]"
        );
        assert_eq!(self.e_score_correction_bias.len(), experts, "the bias is [E]");
        let inter = self.inter();
        let down = StackDims { matrices: experts, rows: hidden, columns: inter };
        assert_eq!(self.down_proj.dims(), down, "down_proj is [E, D, F]");
        let gate_up = StackDims { matrices: experts, rows: inter, columns: hidden };
        assert_eq!(self.gate_up_proj.gated_dims(), gate_up, "gate_up_proj is [E, 2F, D]");
    }

    fn choose(&self, logits: &[f32]) -> Choice {
        let top_k = self.router.top_k;
        let mut choice = Choice { experts: scratch::take(top_k), weights: scratch::take(top_k) };
        choose_experts(self.router, logits, &self.e_score_correction_bias, &mut choice.experts);
        routing_weights(self.router, logits, &choice.experts, &mut choice.weights);
        choice
    }
}

/// The chosen experts, `[K]`, and their weights.
struct Choice {
    experts: Scratch<i32>,
    weights: Scratch<f32>,
}

impl Choice {
    fn expert(&self, k: usize) -> usize {
        self.experts[k] as usize
    }
}

/// `out = x + feed_forward(norm(x))`.
pub(super) fn forward(isa: Isa, layer: &DecodeLayer, x: &[bf16], out: &mut [bf16]) {
    let (hidden, mlp, experts) = (x.len(), &layer.mlp, layer.experts.as_ref());
    mlp.check(hidden);
    if let Some(experts) = experts {
        experts.check(hidden);
    }
    let norm = |x| layer.post_attention_layernorm.apply(isa, x);

    // The router's logits, and what the shared experts hold inside.
    let router = experts.map(|experts| (Product::new(&experts.gate), experts));
    let router_tasks = router.map_or(0, |(product, _)| product.tasks());
    let shared_cut = Cut::new(1, mlp.inter(), 2 * mlp.gate_proj.matrix_bytes());
    let mut logits = scratch::take::<f32>(experts.map_or(0, |experts| experts.router.experts));
    let mut shared_inner = scratch::take::<f32>(mlp.inter());
    let [logits, shared_inner] = [&mut logits, &mut shared_inner].map(|slice| Shared::new(slice));
    let route_and_share = |tasks: &mut Tasks<'_>| {
        let prepare = || {
            let normed = norm(x);
            let rows = |weight| Rows::one(isa, weight, &normed);
            let of_router = router.map(|(product, experts)| (product, rows(&experts.gate)));
            (of_router, [rows(&mlp.gate_proj), rows(&mlp.up_proj)])
        };
        with_prepared(tasks, prepare, |(of_router, [of_gate, of_up]), task| match of_router {
            Some((router, rows)) if task < router_tasks => router.run(isa, task, rows, logits),
            _ => {
                let (_, blocks) = shared_cut.task(task - router_tasks);
                let columns = blocks.start * BLOCK..(blocks.end * BLOCK).min(mlp.inter());
                // SAFETY: each task owns its columns.
                let inner = unsafe { shared_inner.slice(columns) };
                mlp.gated(isa, layer.activation, blocks, [of_gate, of_up], inner);
            }
        });
    };

    // What the chosen experts hold inside.
    let (top_k, inter) = experts.map_or((0, 0), |experts| (experts.router.top_k, experts.inter()));
    let inner_cut = Cut::new(top_k, inter, experts.map_or(0, |experts| experts.gate_up_proj.matrix_bytes()));
    let mut inner = scratch::take::<f32>(top_k * inter);
    let inner = Shared::new(&mut inner);
    // SAFETY: called in phases after the one that wrote the logits.
    let choose = |experts: &DecodeExperts| experts.choose(unsafe { logits.read() });
    let through_experts = |tasks: &mut Tasks<'_>| {
        let Some(experts) = experts else { return };
        let prepare = || (choose(experts), Rows::one(isa, &experts.gate_up_proj, &norm(x)));
        with_prepared(tasks, prepare, |(chosen, rows), task| {
            let (k, blocks) = inner_cut.task(task);
            let columns = blocks.start * BLOCK..(blocks.end * BLOCK).min(inter);
            let mut sums = scratch::take::<f32>(blocks.len() * BLOCK);
            experts.gate_up_proj.multiply_gated(
                isa,
                layer.activation,
                chosen.expert(k),
                blocks,
                rows.row(0),
                &mut sums,
            );
            // SAFETY: each task owns its columns of its expert.
            let inner = unsafe { inner.slice(k * inter + columns.start..k * inter + columns.end) };
            inner.copy_from_slice(&sums[..columns.len()]);
        });
    };

    // Back to the residual stream: routed and shared experts together.
    let routed_bytes = experts.map_or(0, |experts| top_k * experts.down_proj.matrix_bytes());
    let down_cut = Cut::new(1, hidden, routed_bytes + mlp.down_proj.matrix_bytes());
    let out = Shared::new(out);
    let down = |tasks: &mut Tasks<'_>| {
        let prepare = || {
            // SAFETY: the phases that wrote what is inside are over.
            let (inner, shared_inner) = unsafe { (inner.read(), shared_inner.read()) };
            let routed = experts.map(|experts| {
                let row = |k: usize| &inner[k * inter..(k + 1) * inter];
                (experts, choose(experts), Rows::new(isa, &experts.down_proj, top_k, row))
            });
            (routed, Rows::one(isa, &mlp.down_proj, shared_inner))
        };
        with_prepared(tasks, prepare, |(routed, shared), task| {
            let (_, blocks) = down_cut.task(task);
            let mut total = scratch::zeros(blocks.len() * BLOCK);
            let mut sums = scratch::take::<f32>(blocks.len() * BLOCK);
            if let Some((experts, chosen, rows)) = routed {
                for (k, weight) in chosen.weights.iter().enumerate() {
                    experts.down_proj.multiply(isa, chosen.expert(k), blocks.clone(), rows.row(k), &mut sums);
                    add_scaled(isa, &mut total, *weight, &sums);
                }
            }
            mlp.down_proj.multiply(isa, 0, blocks.clone(), shared.row(0), &mut sums);
            add_scaled(isa, &mut total, 1.0, &sums);
            let columns = blocks.start * BLOCK..(blocks.end * BLOCK).min(hidden);
            // SAFETY: each task owns its columns.
            let out = unsafe { out.slice(columns.clone()) };
            add_store(isa, &x[columns.clone()], &total[..columns.len()], out);
        });
    };

    phases::run([
        Phase { tasks: router_tasks + shared_cut.tasks, work: &route_and_share },
        Phase { tasks: inner_cut.tasks, work: &through_experts },
        Phase { tasks: down_cut.tasks, work: &down },
    ]);
}
