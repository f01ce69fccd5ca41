//! The attention of a decoded token: latents, queries, heads over the cache, output projection.
use super::heads::{self, Cut, DecodeAttentionDims, Heads};
use super::weight::{DecodeWeight, Product, Rows, add_store, with_prepared};
use super::{DecodeNorm, DecodeToken};
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::phases::{self, Phase, Tasks};
use crate::quantized::StackDims;
use crate::scratch;
use half::bf16;

/// Projections of multi-head latent attention; the names are the checkpoint's.
#[derive(Clone, Debug)]
pub struct DecodeMla {
    /// Sizes.
    pub dims: DecodeAttentionDims,
    /// `q_a_proj` and `q_a_layernorm`, where queries have a latent.
    pub q_a: Option<(DecodeWeight, DecodeNorm)>,
    /// `q_b_proj`, or `q_proj` where queries have none.
    pub q: DecodeWeight,
    /// `kv_a_proj_with_mqa`
    pub kv_a_proj_with_mqa: DecodeWeight,
    /// `kv_a_layernorm`
    pub kv_a_layernorm: DecodeNorm,
    /// `o_proj`
    pub o_proj: DecodeWeight,
}

impl DecodeMla {
    fn check(&self, hidden: usize, token: &DecodeToken<'_>) {
        let one = |rows, columns| StackDims { matrices: 1, rows, columns };
        let d = &self.dims;
        assert!(token.cached.len().is_multiple_of(d.width()), "cached slots are [R + rope]");
        assert_eq!(
            token.kv_b.len(),
            d.heads * (d.nope + d.value_dim) * d.rank,
            "kv_b is [N * (nope + v), R]"
        );
        let q_rank = match &self.q_a {
            Some((q_a, norm)) => {
                assert_eq!(q_a.dims(), one(norm.weight.len(), hidden), "q_a_proj is [Rq, D]");
                norm.weight.len()
            }
            None => hidden,
        };
        assert_eq!(self.q.dims(), one(d.heads * d.head_dim(), q_rank), "queries are [N * (nope + rope), ..]");
        assert_eq!(
            self.kv_a_proj_with_mqa.dims(),
            one(d.width(), hidden),
            "kv_a_proj_with_mqa is [R + rope, D]"
        );
        assert_eq!(self.kv_a_layernorm.weight.len(), d.rank, "kv_a_layernorm is [R]");
        assert_eq!(self.o_proj.dims(), one(hidden, d.heads * d.value_dim), "o_proj is [D, N * v]");
    }

    /// `out = x + attention(norm(x))`, with the token's own slot of the cache in `own`.
    pub(super) fn forward(
        &self,
        isa: Isa,
        norm: &DecodeNorm,
        token: &DecodeToken<'_>,
        own: &mut [bf16],
        out: &mut [bf16],
    ) {
        self.check(out.len(), token);
        let d = &self.dims;

        // Query latent and key-value latent, from one norm.
        let q_a = self.q_a.as_ref().map(|(weight, norm)| (Product::new(weight), weight, norm));
        let q_a_tasks = q_a.as_ref().map_or(0, |(product, ..)| product.tasks());
        let kv_a = Product::new(&self.kv_a_proj_with_mqa);
        let mut q_latent = scratch::take::<bf16>(q_a.map_or(0, |(_, weight, _)| weight.dims().rows));
        let mut kv_latent = scratch::take::<bf16>(d.width());
        let [q_latent, kv_latent] = [Shared::new(&mut q_latent), Shared::new(&mut kv_latent)];
        let latents = |tasks: &mut Tasks<'_>| {
            let prepare = || {
                let normed = norm.apply(isa, token.x);
                let rows = |weight| Rows::one(isa, weight, &normed);
                (q_a.map(|(product, weight, _)| (product, rows(weight))), rows(&self.kv_a_proj_with_mqa))
            };
            with_prepared(tasks, prepare, |(of_q_a, of_kv_a), task| match of_q_a {
                Some((q_a, rows)) if task < q_a_tasks => q_a.run(isa, task, rows, q_latent),
                _ => kv_a.run(isa, task - q_a_tasks, of_kv_a, kv_latent),
            });
        };

        // Queries; one task more for the token's own slot.
        let q = Product::new(&self.q);
        let mut queries = scratch::take::<bf16>(d.heads * d.head_dim());
        let [queries, own] = [Shared::new(&mut queries), Shared::new(own)];
        let queries_and_slot = |tasks: &mut Tasks<'_>| {
            let prepare = || match q_a {
                // SAFETY: the phase that wrote it is over.
                Some((.., norm)) => Rows::one(isa, &self.q, &norm.apply(isa, unsafe { q_latent.read() })),
                None => Rows::one(isa, &self.q, &norm.apply(isa, token.x)),
            };
            with_prepared(tasks, prepare, |rows, task| {
                if task < q.tasks() {
                    q.run(isa, task, rows, queries);
                } else {
                    // SAFETY: as above, and this task alone writes the slot.
                    let (latent, own) = unsafe { (kv_latent.read(), own.slice(0..d.width())) };
                    let (own_latent, own_key) = own.split_at_mut(d.rank);
                    own_latent.copy_from_slice(&self.kv_a_layernorm.apply(isa, &latent[..d.rank]));
                    heads::rotate_key(isa, d, token.rotary, &latent[d.rank..], own_key);
                }
            });
        };

        let cut = Cut::new(d, token.cached.len() / d.width());
        let mut partials = scratch::take::<f32>(cut.partial_len(d));
        let partials = Shared::new(&mut partials);
        // SAFETY: called in phases after those that wrote queries and slot.
        let heads = || unsafe {
            let (rotary, cached, kv_b) = (token.rotary, token.cached, token.kv_b);
            Heads { dims: *d, q: queries.read(), rotary, cached, own: own.read(), kv_b }
        };
        let over_slots = |tasks: &mut Tasks<'_>| {
            with_prepared(tasks, heads, |heads, task| {
                // SAFETY: each task owns its results.
                heads.partial(isa, &cut, task, unsafe { partials.slice(cut.partial_range(d, task)) });
            });
        };

        let mut attended = scratch::take::<bf16>(d.heads * d.value_dim);
        let attended = Shared::new(&mut attended);
        let to_values = |tasks: &mut Tasks<'_>| {
            with_prepared(tasks, heads, |heads, group| {
                // SAFETY: the phase that wrote the partial results is over; each task owns its heads.
                let (partials, out) =
                    unsafe { (partials.read(), attended.slice(cut.output_range(d, group))) };
                heads.combine(isa, &cut, group, partials, out);
            });
        };

        let o_proj = Product::new(&self.o_proj);
        let out = Shared::new(out);
        let output = |tasks: &mut Tasks<'_>| {
            // SAFETY: the phase that wrote it is over.
            let prepare = || Rows::one(isa, &self.o_proj, unsafe { attended.read() });
            with_prepared(tasks, prepare, |rows, task| {
                o_proj.run_with(isa, task, rows, |columns, sums| {
                    // SAFETY: each task owns its outputs.
                    add_store(isa, &token.x[columns.clone()], sums, unsafe { out.slice(columns) });
                });
            });
        };

        phases::run([
            Phase { tasks: q_a_tasks + kv_a.tasks(), work: &latents },
            Phase { tasks: q.tasks() + 1, work: &queries_and_slot },
            Phase { tasks: cut.partials(), work: &over_slots },
            Phase { tasks: cut.groups(), work: &to_values },
            Phase { tasks: o_proj.tasks(), work: &output },
        ]);
    }
}
