//! `quantization`: how the frozen base is held in memory under adapters (QLoRA).

use mistral4_checkpoint::weights::{Bits, WeightFormat, WeightQuantization};

use super::reader::Section;
use crate::error::Result;

/// Columns that share a scale unless the recipe says otherwise.
const GROUP_SIZE: usize = 32;

#[derive(Clone, Copy)]
enum Format {
    Int(Bits),
    Fp8,
}

/// Reads the section; `None` where it is absent or switches everything off.
pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<WeightQuantization>> {
    const FORMATS: [(&str, Format); 3] =
        [("int4", Format::Int(Bits::Four)), ("int8", Format::Int(Bits::Eight)), ("fp8", Format::Fp8)];
    const SIZES: [(&str, usize); 4] = [("32", 32), ("64", 64), ("128", 128), ("256", 256)];
    let Some(mut s) = root.optional_section("quantization")? else { return Ok(None) };
    let named =
        s.name("weights", "format in which the base's linear maps and experts stay in memory", &FORMATS)?;
    let four = s.bool("load_in_4bit", "as `weights: int4`: integers in groups, not bitsandbytes' nf4")?;
    let eight = s.bool("load_in_8bit", "as `weights: int8`: integers in groups")?;
    let group_size = s.name("group_size", "columns that share a scale, for int4 and int8", &SIZES)?;
    s.none_of_effect(
        &[
            "bnb_4bit_compute_dtype",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_quant_type",
            "bnb_4bit_quant_storage",
            "llm_int8_threshold",
            "llm_int8_has_fp16_weight",
        ],
        "for bitsandbytes; here codes are integers with a scale for each group of columns",
    );
    let format = named.or(match (four, eight) {
        (Some(true), _) => Some(Format::Int(Bits::Four)),
        (_, Some(true)) => Some(Format::Int(Bits::Eight)),
        _ => None,
    });
    s.finish()?;
    let group_size = group_size.unwrap_or(GROUP_SIZE);
    let weights = format.map(|format| match format {
        Format::Int(bits) => WeightFormat::Int { bits, group_size, symmetric: true },
        Format::Fp8 => WeightFormat::Fp8,
    });
    Ok(weights.map(|weights| WeightQuantization { weights, lm_head: None }))
}
