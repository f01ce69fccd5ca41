//! Attention against the plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{
    Attention, AttentionDims, AttentionGrads, AttentionSaved, Element, LatentAttention, LatentDims,
    MlaAttention, MlaDims, MlaGrads, Segment, attention, attention_backward, bf16, latent_attention,
    mla_attention, mla_attention_backward, reference,
};

struct Case<T> {
    dims: AttentionDims,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    segments: Vec<Segment>,
    q_rows: usize,
    k_rows: usize,
}

impl<T: Element> Case<T> {
    fn new(dims: AttentionDims, q_rows: usize, k_rows: usize, segments: Vec<Segment>) -> Self {
        let mut random = Random::new((q_rows * 31 + k_rows) as u64);
        Self {
            dims,
            segments,
            q_rows,
            k_rows,
            q: random.values(q_rows * dims.q_stride, 1.0),
            k: random.values(k_rows * dims.k_stride, 1.0),
            v: random.values(k_rows * dims.v_stride, 1.0),
        }
    }

    fn input(&self) -> Attention<'_, T> {
        let scale = 2.0 / (self.dims.head_dim as f32).sqrt();
        Attention { dims: self.dims, q: &self.q, k: &self.k, v: &self.v, segments: &self.segments, scale }
    }

    fn compare(&self) {
        let d = self.dims;
        let out_len = self.q_rows * d.heads * d.value_dim;
        let (mut got, mut want) = (poison::<T>(out_len), poison::<T>(out_len));
        let mut lse = poison::<f32>(self.q_rows * d.heads);
        let mut want_lse = lse.clone();
        attention(&self.input(), &mut got, &mut lse);
        reference::attention(&self.input(), &mut want, &mut want_lse);
        assert_close("out", &got, &want, tolerance::<T>());
        let finite = |lse: &[f32]| -> Vec<f32> { lse.iter().map(|l| l.max(-1e3)).collect() };
        assert_close("lse", &finite(&lse), &finite(&want_lse), 1e-4);

        let dout = Random::new(9).values::<T>(out_len, 1.0);
        let sizes = [
            self.q_rows * d.heads * d.head_dim,
            self.k_rows * d.kv_heads * d.head_dim,
            self.k_rows * d.kv_heads * d.value_dim,
        ];
        let [mut q, mut k, mut v] = sizes.map(poison::<T>);
        let grads = AttentionGrads { q: &mut q, k: &mut k, v: &mut v };
        attention_backward(&self.input(), AttentionSaved { out: &got, lse: &lse }, &dout, grads);
        let [mut want_q, mut want_k, mut want_v] = sizes.map(poison::<T>);
        let grads = AttentionGrads { q: &mut want_q, k: &mut want_k, v: &mut want_v };
        reference::attention_backward(&self.input(), &dout, grads);
        assert_close("dq", &q, &want_q, 2.0 * tolerance::<T>());
        assert_close("dk", &k, &want_k, 2.0 * tolerance::<T>());
        assert_close("dv", &v, &want_v, 2.0 * tolerance::<T>());
    }
}

fn whole(q: usize, k: usize, causal: Option<isize>) -> Vec<Segment> {
    vec![Segment { q: 0..q, k: 0..k, causal }]
}

fn cases<T: Element>() {
    let dims = AttentionDims::contiguous;
    Case::<T>::new(dims(1, 1, 1, 1), 1, 1, whole(1, 1, None)).compare();
    Case::<T>::new(dims(3, 3, 24, 16), 37, 37, whole(37, 37, Some(0))).compare();
    Case::<T>::new(dims(4, 2, 33, 41), 50, 210, whole(50, 210, Some(160))).compare();
    Case::<T>::new(dims(6, 1, 20, 12), 3, 130, whole(3, 130, Some(127))).compare();
    Case::<T>::new(dims(2, 2, 16, 8), 20, 9, whole(20, 9, None)).compare();
    // Few queries, keys in several splits, the last ones hidden from the first query.
    Case::<T>::new(dims(8, 2, 33, 41), 4, 700, whole(4, 700, Some(510))).compare();
    Case::<T>::new(dims(33, 1, 20, 12), 1, 300, whole(1, 300, None)).compare();
    // Early queries see nothing (offset below zero), late ones see everything.
    Case::<T>::new(dims(2, 1, 16, 8), 20, 9, whole(20, 9, Some(-5))).compare();
    // Packed sequences, a gap in the queries, keys shared by two segments, no keys at all.
    let segments = vec![
        Segment { q: 0..13, k: 0..13, causal: Some(0) },
        Segment { q: 13..14, k: 13..14, causal: Some(0) },
        Segment { q: 20..31, k: 10..31, causal: Some(10) },
        Segment { q: 31..33, k: 31..31, causal: None },
        Segment { q: 33..40, k: 0..40, causal: None },
    ];
    Case::<T>::new(dims(2, 2, 16, 24), 42, 42, segments).compare();
}

#[test]
fn f32_attention() {
    on_each_isa(|_| cases::<f32>());
}

#[test]
fn bf16_attention() {
    on_each_isa(|_| cases::<bf16>());
}

/// Latent attention: one key-value head, and the values are the front of the keys.
#[test]
fn values_inside_keys() {
    let dims = AttentionDims { v_stride: 20, ..AttentionDims::contiguous(5, 1, 20, 16) };
    on_each_isa(|_| {
        let mut case = Case::<f32>::new(dims, 2, 100, whole(2, 100, Some(98)));
        case.v = case.k.clone();
        case.compare();
        let (mut a, mut b) = (poison::<f32>(2 * 5 * 16), poison::<f32>(2 * 5 * 16));
        let mut lse = poison(10);
        attention(&case.input(), &mut a, &mut lse);
        attention(&Attention { v: &case.k, ..case.input() }, &mut b, &mut lse);
        assert_eq!(a, b);
    });
}

/// Against the plain twin on keys and values that are laid out by hand.
fn expanded_cases<T: Element>() {
    let segments = vec![
        Segment { q: 0..13, k: 0..13, causal: Some(0) },
        Segment { q: 13..14, k: 13..14, causal: Some(0) },
        Segment { q: 17..60, k: 17..60, causal: Some(0) },
    ];
    let dims = MlaDims { heads: 3, nope: 7, rope: 6, value_dim: 9 };
    for (dims, tokens, segments) in [(dims, 61, segments), (dims, 0, vec![]), (dims, 2, whole(2, 2, Some(0)))]
    {
        let MlaDims { heads, nope, rope, value_dim } = dims;
        let mut random = Random::new(tokens as u64);
        let q = random.values::<T>(tokens * heads * (nope + rope), 1.0);
        let kv = random.values::<T>(tokens * heads * (nope + value_dim), 1.0);
        let k_pe = random.values::<T>(tokens * rope, 1.0);
        let input = MlaAttention { dims, q: &q, kv: &kv, k_pe: &k_pe, segments: &segments, scale: 0.4 };
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (index, head) in kv.chunks(nope + value_dim).enumerate() {
            k.extend_from_slice(&head[..nope]);
            k.extend_from_slice(&k_pe[index / heads * rope..][..rope]);
            v.extend_from_slice(&head[nope..]);
        }
        let plain = AttentionDims::contiguous(heads, heads, nope + rope, value_dim);
        let plain = Attention { dims: plain, q: &q, k: &k, v: &v, segments: &segments, scale: 0.4 };

        let len = tokens * heads * value_dim;
        let (mut got, mut want) = (poison::<T>(len), poison::<T>(len));
        let mut lse = poison::<f32>(tokens * heads);
        mla_attention(&input, &mut got, &mut lse);
        reference::attention(&plain, &mut want, &mut lse.clone());
        assert_close("out", &got, &want, tolerance::<T>());

        let dout = random.values::<T>(len, 1.0);
        let [mut dq, mut dkv, mut dk_pe] = [q.len(), kv.len(), k_pe.len()].map(poison::<T>);
        let grads = MlaGrads { q: &mut dq, kv: &mut dkv, k_pe: &mut dk_pe };
        mla_attention_backward(&input, AttentionSaved { out: &got, lse: &lse }, &dout, grads);
        let [mut want_q, mut want_k, mut want_v] = [q.len(), k.len(), v.len()].map(poison::<T>);
        let grads = AttentionGrads { q: &mut want_q, k: &mut want_k, v: &mut want_v };
        reference::attention_backward(&plain, &dout, grads);
        let (mut want_kv, mut want_pe) = (Vec::new(), vec![0.0f32; k_pe.len()]);
        for (index, (dk, dv)) in want_k.chunks(nope + rope).zip(want_v.chunks(value_dim)).enumerate() {
            want_kv.extend_from_slice(&dk[..nope]);
            want_kv.extend_from_slice(dv);
            let sums = &mut want_pe[index / heads * rope..][..rope];
            sums.iter_mut().zip(&dk[nope..]).for_each(|(sum, dk)| *sum += dk.to_f32());
        }
        let want_pe: Vec<T> = want_pe.into_iter().map(T::from_f32).collect();
        assert_close("dq", &dq, &want_q, 2.0 * tolerance::<T>());
        assert_close("dkv", &dkv, &want_kv, 2.0 * tolerance::<T>());
        assert_close("dk_pe", &dk_pe, &want_pe, 2.0 * tolerance::<T>());
    }
}

#[test]
fn f32_expanded() {
    on_each_isa(|_| expanded_cases::<f32>());
}

#[test]
fn bf16_expanded() {
    on_each_isa(|_| expanded_cases::<bf16>());
}

fn latent_cases<T: Element>() {
    let dims = LatentDims { heads: 5, nope: 7, rope: 6, rank: 21, value_dim: 9, latent_stride: 31 };
    let rows = |tokens, slots, offset| (dims, tokens, whole(tokens, slots, Some(offset)));
    let small = LatentDims { heads: 1, nope: 1, rope: 1, rank: 1, value_dim: 1, latent_stride: 2 };
    // Two rows of a batch, the second padded on its left; a query between them sees nothing.
    let batch = vec![
        Segment { q: 0..1, k: 0..40, causal: Some(39) },
        Segment { q: 2..3, k: 55..80, causal: Some(24) },
    ];
    let cases = [
        rows(1, 300, 299),
        rows(4, 50, 46),
        rows(70, 90, 20),
        (small, 1, whole(1, 1, None)),
        (dims, 3, batch),
    ];
    for (dims, tokens, segments) in cases {
        let slots = segments.iter().map(|s| s.k.end).max().unwrap();
        let mut random = Random::new((tokens * 31 + slots) as u64);
        let q = random.values::<T>(tokens * dims.heads * (dims.nope + dims.rope), 1.0);
        let latents = random.values::<T>(slots * dims.latent_stride, 1.0);
        let kv_b = random.values::<T>(dims.heads * (dims.nope + dims.value_dim) * dims.rank, 0.3);
        let input =
            LatentAttention { dims, q: &q, latents: &latents, kv_b: &kv_b, segments: &segments, scale: 0.4 };
        let len = tokens * dims.heads * dims.value_dim;
        let (mut got, mut want) = (poison::<T>(len), poison::<T>(len));
        latent_attention(&input, &mut got);
        reference::latent_attention(&input, &mut want);
        assert_close("out", &got, &want, tolerance::<T>());
    }
}

#[test]
fn f32_latents() {
    on_each_isa(|_| latent_cases::<f32>());
}

#[test]
fn bf16_latents() {
    on_each_isa(|_| latent_cases::<bf16>());
}

#[test]
fn large_scores_stay_finite() {
    let mut case = Case::<f32>::new(AttentionDims::contiguous(1, 1, 8, 8), 5, 300, whole(5, 300, None));
    case.q.iter_mut().for_each(|q| *q *= 1000.0);
    on_each_isa(|_| {
        let (mut out, mut want) = (poison::<f32>(40), poison::<f32>(40));
        let mut lse = poison(5);
        attention(&case.input(), &mut out, &mut lse);
        reference::attention(&case.input(), &mut want, &mut lse);
        assert_close("out", &out, &want, 1e-3);
    });
}

#[test]
#[should_panic(expected = "two segments")]
fn shared_queries_are_refused() {
    let segments =
        vec![Segment { q: 0..3, k: 0..3, causal: None }, Segment { q: 2..4, k: 0..3, causal: None }];
    let case = Case::<f32>::new(AttentionDims::contiguous(1, 1, 4, 4), 4, 4, segments);
    attention(&case.input(), &mut poison(16), &mut poison(4));
}

#[test]
fn results_do_not_depend_on_threads() {
    let case = Case::<bf16>::new(AttentionDims::contiguous(4, 2, 32, 32), 70, 150, whole(70, 150, Some(80)));
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let mut out = poison::<bf16>(70 * 4 * 32);
            let mut lse = poison::<f32>(70 * 4);
            attention(&case.input(), &mut out, &mut lse);
            let [mut q, mut k, mut v] = [70 * 128, 150 * 64, 150 * 64].map(poison::<bf16>);
            let grads = AttentionGrads { q: &mut q, k: &mut k, v: &mut v };
            attention_backward(&case.input(), AttentionSaved { out: &out, lse: &lse }, &out, grads);
            (out, lse, q, k, v)
        })
    };
    assert!(run(1) == run(3));
}
