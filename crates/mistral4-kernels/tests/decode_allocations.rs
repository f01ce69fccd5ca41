//! A decoded token takes no memory in a layer once the first ones have: counted by the allocator, so in a program of its
//! own.
#![allow(dead_code, reason = "the other tests use more of these modules")]
#[path = "kernels/counting.rs"]
mod counting;
#[path = "kernels/decode_layer_maker.rs"]
mod decode_layer_maker;
#[path = "kernels/support.rs"]
mod support;

use counting::taken;
use decode_layer_maker::{Maker, STORES, Sizes, attention};
use mistral4_kernels::{DecodeToken, Rotary, bf16, decode_layer};
use support::{Random, on_each_isa, poison};

#[test]
fn decoding_takes_no_memory() {
    const TOKENS: usize = 100;
    /// So many times as many tokens are tried until none takes memory: each thread must have had every kind of task.
    const WINDOWS: usize = 30;
    let sizes = Sizes {
        hidden: 96,
        q_rank: Some(48),
        attention: attention([6, 24, 8, 64, 32], true),
        experts: Some([8, 4, 48]),
        shared: 64,
        slots: 600,
    };
    let d = sizes.attention;
    assert!(taken() > 0, "the allocator counts");
    on_each_isa(|isa| {
        for store in STORES {
            let mut maker = Maker { random: Random::new(5), store, made: 0 };
            let layer = maker.layer(&sizes);
            let random = &mut maker.random;
            let x = random.values::<bf16>(sizes.hidden, 1.0);
            let cached = random.values::<bf16>(sizes.slots * (d.rank + d.rope), 1.0);
            let kv_b = random.values::<bf16>(d.heads * (d.nope + d.value_dim) * d.rank, 0.1);
            let (sin, cos) = (vec![0.6f32; d.rope / 2], vec![0.8f32; d.rope / 2]);
            let rotary = Rotary { cos: &cos, sin: &sin, query_scale: 1.0 };
            let (mut out, mut own) = (poison::<bf16>(sizes.hidden), poison::<bf16>(d.rank + d.rope));
            let mut decode = |tokens: usize| {
                let before = taken();
                for token in 0..tokens {
                    let cached = &cached[..(sizes.slots - token) * (d.rank + d.rope)];
                    let token = DecodeToken { x: &x, rotary, cached, kv_b: &kv_b };
                    decode_layer(&layer, &token, &mut out, &mut own);
                }
                taken() - before
            };
            assert!((0..WINDOWS).any(|_| decode(TOKENS) == 0), "{isa:?} {store:?}");
        }
    });
}
