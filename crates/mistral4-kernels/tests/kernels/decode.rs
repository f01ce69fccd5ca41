//! The step of a decoded token against its plain twin.
use crate::decode_layer_maker::{Maker, STORES, Sizes, attention};
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{DecodeToken, Rotary, bf16, decode_head, decode_layer, reference};

const SIZES: [Sizes; 4] = [
    Sizes {
        hidden: 64,
        q_rank: Some(32),
        attention: attention([4, 16, 8, 32, 16], true),
        experts: Some([8, 4, 32]),
        shared: 32,
        slots: 40,
    },
    Sizes {
        hidden: 37,
        q_rank: None,
        attention: attention([3, 5, 2, 9, 7], false),
        experts: Some([5, 2, 17]),
        shared: 19,
        slots: 0,
    },
    Sizes {
        hidden: 130,
        q_rank: Some(35),
        attention: attention([6, 33, 6, 70, 40], true),
        experts: None,
        shared: 77,
        slots: 700,
    },
    Sizes {
        hidden: 33,
        q_rank: Some(1),
        attention: attention([1, 1, 2, 1, 1], true),
        experts: Some([1, 1, 1]),
        shared: 1,
        slots: 255,
    },
];

#[test]
fn decoded_tokens() {
    on_each_isa(|isa| {
        for (index, sizes) in SIZES.iter().enumerate() {
            for store in STORES {
                let mut maker = Maker { random: Random::new(7 + index as u64), store, made: 0 };
                let layer = maker.layer(sizes);
                let (d, random) = (sizes.attention, &mut maker.random);
                let x = random.values::<bf16>(sizes.hidden, 1.0);
                let cached = random.values::<bf16>(sizes.slots * (d.rank + d.rope), 1.0);
                let kv_b = random
                    .values::<bf16>(d.heads * (d.nope + d.value_dim) * d.rank, 1.0 / (d.rank as f32).sqrt());
                let angles = random.values::<f32>(d.rope / 2, 3.0);
                let (sin, cos): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| angle.sin_cos()).unzip();
                let rotary = Rotary { cos: &cos, sin: &sin, query_scale: 1.2 };
                let token = DecodeToken { x: &x, rotary, cached: &cached, kv_b: &kv_b };
                let outputs = || (poison::<bf16>(sizes.hidden), poison::<bf16>(d.rank + d.rope));
                let ((mut got, mut got_own), (mut want, mut want_own)) = (outputs(), outputs());
                decode_layer(&layer, &token, &mut got, &mut got_own);
                reference::decode_layer(&layer, &token, &mut want, &mut want_own);
                let what = format!("{isa:?} {store:?} {sizes:?}");
                assert_close(&what, &got, &want, tolerance::<bf16>());
                assert_close(&what, &got_own, &want_own, tolerance::<bf16>());

                let mut again = outputs();
                rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool").install(|| {
                    isa.run(|| decode_layer(&layer, &token, &mut again.0, &mut again.1));
                });
                assert_eq!((again.0, again.1), (got, got_own), "one thread, {what}");
            }
        }
    });
}

#[test]
fn decoded_logits() {
    on_each_isa(|isa| {
        for (vocab, hidden) in [(1, 1), (33, 37), (700, 130)] {
            for store in STORES {
                let mut maker = Maker { random: Random::new(vocab as u64), store, made: 0 };
                let (norm, lm_head) = (maker.norm(hidden), maker.one(vocab, hidden));
                let x = maker.random.values::<bf16>(hidden, 1.0);
                let (mut got, mut want) = (poison::<f32>(vocab), poison::<f32>(vocab));
                decode_head(&norm, &lm_head, &x, &mut got);
                reference::decode_head(&norm, &lm_head, &x, &mut want);
                let what = format!("{isa:?} {store:?} {vocab} x {hidden}");
                assert_close(&what, &got, &want, tolerance::<bf16>());
                assert!(got.iter().all(|logit| bf16::from_f32(*logit).to_f32() == *logit), "rounded, {what}");
            }
        }
    });
}
