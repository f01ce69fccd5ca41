//! Choices of how weights are quantised.

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use mistral4_checkpoint::weights::{Bits, WeightFormat, WeightQuantization};

use crate::error::{Error, Result};

/// Columns that share a scale unless `--group-size` says otherwise, as in llama.cpp's q4_0 and q8_0.
const GROUP_SIZE: u32 = 32;

/// Formats of quantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizedFormat {
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
    /// FP8 (e4m3).
    Fp8,
}

impl QuantizedFormat {
    /// The format's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            QuantizedFormat::Int8 => "int8",
            QuantizedFormat::Int4 => "int4",
            QuantizedFormat::Fp8 => "fp8",
        }
    }

    fn bits(self) -> Option<Bits> {
        match self {
            QuantizedFormat::Int8 => Some(Bits::Eight),
            QuantizedFormat::Int4 => Some(Bits::Four),
            QuantizedFormat::Fp8 => None,
        }
    }
}

impl ValueEnum for QuantizedFormat {
    fn value_variants<'a>() -> &'a [Self] {
        &[QuantizedFormat::Int8, QuantizedFormat::Int4, QuantizedFormat::Fp8]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// Details of quantisation.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct GroupArguments {
    /// Columns that share a scale, for int8 and int4: 32, 64, 128 or 256 [default: 32]
    #[arg(long, value_name = "N")]
    pub group_size: Option<u32>,
    /// Give each group of int8 or int4 a zero point as well as a scale
    #[arg(long)]
    pub asymmetric: bool,
    /// Format of the output projection: int8, int4, or none to leave it as it is
    #[arg(long, value_name = "FORMAT", value_parser = parse_head)]
    pub quantize_lm_head: Option<Head>,
}

/// Format of the output projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// As it is.
    Dense,
    /// Quantised.
    Int(Bits),
}

fn parse_head(text: &str) -> Result<Head, String> {
    match text {
        "none" => Ok(Head::Dense),
        "int8" => Ok(Head::Int(Bits::Eight)),
        "int4" => Ok(Head::Int(Bits::Four)),
        _ => Err("use int8, int4 or none".to_owned()),
    }
}

/// Quantisation of a model while it is loaded.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct QuantizeArguments {
    /// Keep the decoder's linears and experts quantised in memory: int8, int4 or fp8
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub quantize: Option<QuantizedFormat>,
    /// Details.
    #[command(flatten)]
    pub groups: GroupArguments,
}

impl QuantizeArguments {
    /// The choice; the output projection takes 8 bits beside integer weights, as llama.cpp keeps it finer than the rest.
    ///
    /// # Errors
    /// Details without a format that has them, or an unknown group size.
    pub fn resolve(&self) -> Result<Option<WeightQuantization>> {
        self.groups.resolve(self.quantize, "--quantize", Some(Bits::Eight))
    }
}

impl GroupArguments {
    /// The choice for weights of `format`, which `option` gave; `head` is the default of the output projection.
    ///
    /// # Errors
    /// As [`QuantizeArguments::resolve`].
    pub(crate) fn resolve(
        &self,
        format: Option<QuantizedFormat>,
        option: &str,
        head: Option<Bits>,
    ) -> Result<Option<WeightQuantization>> {
        let Some(bits) = format.and_then(QuantizedFormat::bits) else {
            let given = [
                (self.group_size.is_some(), "--group-size"),
                (self.asymmetric, "--asymmetric"),
                (self.quantize_lm_head.is_some(), "--quantize-lm-head"),
            ];
            if let Some((_, name)) = given.iter().find(|(given, _)| *given) {
                return Err(Error::input(
                    format!("{name} is a detail of integer weights"),
                    format!("add {option} int8 or {option} int4, or leave {name} out"),
                ));
            }
            let fp8 = WeightQuantization { weights: WeightFormat::Fp8, lm_head: None };
            return Ok(format.map(|_| fp8));
        };
        let group_size = self.group_size.unwrap_or(GROUP_SIZE);
        if ![32, 64, 128, 256].contains(&group_size) {
            return Err(Error::input(
                format!("--group-size {group_size} is not supported"),
                "use 32, 64, 128 or 256",
            ));
        }
        let format =
            |bits| WeightFormat::Int { bits, group_size: group_size as usize, symmetric: !self.asymmetric };
        let head = match self.quantize_lm_head {
            None => head,
            Some(Head::Dense) => None,
            Some(Head::Int(bits)) => Some(bits),
        };
        Ok(Some(WeightQuantization { weights: format(bits), lm_head: head.map(format) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_need_a_format_that_has_them() {
        let detail = GroupArguments { group_size: Some(64), ..GroupArguments::default() };
        let resolve = |groups, quantize| QuantizeArguments { quantize, groups }.resolve();
        assert!(resolve(detail, None).is_err());
        assert!(resolve(detail, Some(QuantizedFormat::Fp8)).is_err());
        assert!(resolve(detail, Some(QuantizedFormat::Int4)).is_ok());
        assert!(
            resolve(GroupArguments { group_size: Some(48), ..detail }, Some(QuantizedFormat::Int4)).is_err()
        );
        assert_eq!(resolve(GroupArguments::default(), None).unwrap(), None);
    }

    #[test]
    fn the_head_is_finer_unless_asked_otherwise() {
        let head = |groups: GroupArguments| {
            let quantize = Some(QuantizedFormat::Int4);
            QuantizeArguments { quantize, groups }.resolve().unwrap().unwrap().lm_head
        };
        let int = |bits| Some(WeightFormat::Int { bits, group_size: 32, symmetric: true });
        let asked = |head| GroupArguments { quantize_lm_head: Some(head), ..GroupArguments::default() };
        assert_eq!(head(GroupArguments::default()), int(Bits::Eight));
        assert_eq!(head(asked(Head::Int(Bits::Four))), int(Bits::Four));
        assert_eq!(head(asked(Head::Dense)), None);
    }
}
