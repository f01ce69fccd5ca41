//! `packed_sequence`: several samples in one row.

use super::reader::Section;
use crate::error::Result;

/// `packed_sequence`: several samples in one row, none of which sees another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSequenceConfig {
    /// Tokens of a row.
    pub packed_sequence_size: usize,
    /// Samples among which the best-fitting place is looked for.
    pub buffer_size: usize,
    /// Whether samples longer than a row are left out instead of refused.
    pub drop_long_samples: bool,
}

impl PackedSequenceConfig {
    /// Reads the section; `None` when packing is off.
    pub(crate) fn read(root: &mut Section<'_>) -> Result<Option<Self>> {
        let mut s = root.section("packed_sequence")?;
        let size = s.usize("packed_sequence_size", "tokens of a packed row; 0 switches packing off")?;
        let size = size.or(s.usize("pack_size", "tokens of a packed row; 0 switches packing off")?);
        s.name(
            "packing_strategy",
            "one form of packing: sequences never see each other",
            &[("thd", ()), ("neat", ())],
        )?;
        let buffer_size = s.count("buffer_size", "samples among which a fitting place is looked for")?;
        let drop_long = s.bool("drop_long_samples", "samples longer than a row are left out")?;
        s.none_of_effect(
            &["pretokenize", "num_workers", "attn_implementation", "max_length"],
            "one form of packing",
        );
        s.unsupported("max_packs", "limit the data set instead (limit_dataset_samples)");
        s.unsupported("split_across_pack", "samples are never split");
        s.finish()?;
        Ok(size.filter(|&size| size > 0).map(|packed_sequence_size| Self {
            packed_sequence_size,
            buffer_size: buffer_size.unwrap_or(1024),
            drop_long_samples: drop_long.unwrap_or(true),
        }))
    }
}
