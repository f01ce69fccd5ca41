//! The weights of a layer that stay quantised, by name: they are no parameters, so no walk over parameters meets them.

use super::decoder_layer::{DecoderLayer, FeedForward};
use super::experts::Experts;
use super::linear::Linear;
use super::mla::Mla;
use super::mlp::Mlp;
use super::weight::{ExpertWeight, LinearWeight, Quantized};

/// A quantised weight and its key, relative to the module that was asked.
pub type NamedQuantized<'a> = (String, &'a mut Quantized);

impl DecoderLayer {
    /// The quantised weights.
    pub fn quantized_mut(&mut self) -> Vec<NamedQuantized<'_>> {
        let mut found = under("self_attn", self.self_attn.quantized_mut());
        found.extend(match &mut self.mlp {
            FeedForward::Dense(mlp) => under("mlp", mlp.quantized_mut()),
            FeedForward::Moe(moe) => {
                let mut found = under("mlp.experts", moe.experts.quantized_mut());
                found.extend(under("mlp.shared_experts", moe.shared_experts.quantized_mut()));
                found
            }
        });
        found
    }
}

impl Linear {
    /// The weight, if it is quantised.
    pub fn quantized_mut(&mut self) -> Vec<NamedQuantized<'_>> {
        match &mut self.weight {
            LinearWeight::Quantized(weight) => vec![("weight".to_owned(), weight)],
            LinearWeight::Dense(_) | LinearWeight::Packed(_) => Vec::new(),
        }
    }
}

impl Mla {
    fn quantized_mut(&mut self) -> Vec<NamedQuantized<'_>> {
        let linears = [
            ("q_proj", self.q_proj.as_mut()),
            ("q_a_proj", self.q_a_proj.as_mut()),
            ("q_b_proj", self.q_b_proj.as_mut()),
            ("kv_a_proj_with_mqa", Some(&mut self.kv_a_proj_with_mqa)),
            ("kv_b_proj", Some(&mut self.kv_b_proj)),
            ("o_proj", Some(&mut self.o_proj)),
        ];
        let of = |(name, linear): (&str, Option<_>)| Some(under(name, Linear::quantized_mut(linear?)));
        linears.into_iter().filter_map(of).flatten().collect()
    }
}

impl Mlp {
    fn quantized_mut(&mut self) -> Vec<NamedQuantized<'_>> {
        let linears = [
            ("gate_proj", &mut self.gate_proj),
            ("up_proj", &mut self.up_proj),
            ("down_proj", &mut self.down_proj),
        ];
        linears.into_iter().flat_map(|(name, linear)| under(name, linear.quantized_mut())).collect()
    }
}

impl Experts {
    fn quantized_mut(&mut self) -> Vec<NamedQuantized<'_>> {
        let mut found = Vec::new();
        for (name, weight) in [("gate_up_proj", &mut self.gate_up_proj), ("down_proj", &mut self.down_proj)] {
            if let ExpertWeight::Quantized(weight) = weight {
                found.push((name.to_owned(), weight));
            }
        }
        found
    }
}

fn under<'a>(prefix: &str, found: Vec<NamedQuantized<'a>>) -> Vec<NamedQuantized<'a>> {
    found.into_iter().map(|(key, weight)| (format!("{prefix}.{key}"), weight)).collect()
}
