//! Gated activations and sums against the plain twin.
use crate::support::{Random, assert_close, on_each_isa, poison, tolerance};
use mistral4_kernels::{Activation, Element, add, bf16, gated, gated_backward, reference};

const LENGTHS: [usize; 5] = [0, 1, 255, 4099, 40_001];

fn gated_cases<T: Element>() {
    use Activation::{Gelu, GeluTanh, Relu, Silu};
    for (len, activation) in
        LENGTHS.into_iter().flat_map(|len| [Silu, Gelu, GeluTanh, Relu].map(|a| (len, a)))
    {
        let mut random = Random::new(len as u64 + 1);
        let [gate, up, dout] = std::array::from_fn(|_| random.values::<T>(len, 3.0));
        let (mut got, mut want) = (poison::<T>(len), poison::<T>(len));
        gated(activation, &gate, &up, &mut got);
        reference::gated(activation, &gate, &up, &mut want);
        assert_close("out", &got, &want, tolerance::<T>());
        let [mut dgate, mut dup, mut want_dgate, mut want_dup] = std::array::from_fn(|_| poison::<T>(len));
        let inputs = [&gate[..], &up, &dout];
        gated_backward(activation, inputs, [&mut dgate, &mut dup]);
        reference::gated_backward(activation, inputs, [&mut want_dgate, &mut want_dup]);
        assert_close("dgate", &dgate, &want_dgate, tolerance::<T>());
        assert_close("dup", &dup, &want_dup, tolerance::<T>());
    }
}

#[test]
fn f32_gates() {
    on_each_isa(|_| gated_cases::<f32>());
}

#[test]
fn bf16_gates() {
    on_each_isa(|_| gated_cases::<bf16>());
}

#[test]
fn sums_are_exact() {
    on_each_isa(|_| {
        for len in LENGTHS {
            let mut random = Random::new(len as u64);
            let [a, b] = std::array::from_fn(|_| random.values::<bf16>(len, 1.0));
            let mut got = poison::<bf16>(len);
            add(&a, &b, &mut got);
            let want: Vec<bf16> =
                a.iter().zip(&b).map(|(a, b)| bf16::from_f32(f32::from(*a) + f32::from(*b))).collect();
            assert_eq!(got, want);
        }
    });
}
