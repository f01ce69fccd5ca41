//! Parts of a stack of quantised matrices, as ranks keep them: some matrices, or some panels of 16 rows.
use super::LANES;
use super::matrix::{QuantizedMatrix, Scales, StackDims, Tile};
use half::bf16;
use std::ops::Range;

impl QuantizedMatrix {
    /// Some of the matrices.
    ///
    /// # Panics
    /// When the range ends past the last.
    pub fn matrices(&self, range: Range<usize>) -> Self {
        let panels = self.panels();
        let part = self.panels_as_matrix(range.start * panels..range.end * panels);
        Self { dims: StackDims { matrices: range.len(), ..self.dims }, ..part }
    }

    /// Panels of all matrices: the last one of each may have fewer than 16 rows.
    pub fn all_panels(&self) -> usize {
        self.dims.matrices * self.panels()
    }

    /// Some panels, counted over all matrices, as one matrix with 16 rows each.
    ///
    /// # Panics
    /// When the range ends past the last.
    pub fn panels_as_matrix(&self, range: Range<usize>) -> Self {
        let of = |each: usize| range.start * each..range.end * each;
        let lanes = of(self.groups() * LANES);
        Self {
            dims: StackDims { matrices: 1, rows: range.len() * LANES, columns: self.dims.columns },
            scheme: self.scheme,
            codes: self.codes[of(self.tiles())].to_vec(),
            scales: match &self.scales {
                Scales::Bf16(scales) => Scales::Bf16(scales[lanes.clone()].to_vec()),
                Scales::F32(scales) => Scales::F32(scales[lanes.clone()].to_vec()),
            },
            zeros: if self.zeros.is_empty() { Vec::new() } else { self.zeros[lanes].to_vec() },
        }
    }

    /// Codes, scales and zero points, for [`QuantizedMatrix::joined`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes());
        self.codes.iter().for_each(|tile| bytes.extend_from_slice(&tile.0));
        match &self.scales {
            Scales::Bf16(scales) => scales.iter().for_each(|scale| bytes.extend(scale.to_le_bytes())),
            Scales::F32(scales) => scales.iter().for_each(|scale| bytes.extend(scale.to_le_bytes())),
        }
        bytes.extend_from_slice(&self.zeros);
        bytes
    }

    /// The stack of sizes `dims` whose panels are, in their order, those of `parts` ([`QuantizedMatrix::to_bytes`]); its
    /// values are coded as this one's, which is one of the parts.
    ///
    /// # Panics
    /// When the parts do not make up a stack of these sizes.
    pub fn joined<'a>(&self, dims: StackDims, parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut whole = Self {
            dims,
            scheme: self.scheme,
            codes: Vec::new(),
            scales: self.scales.zeros_like(0),
            zeros: Vec::new(),
        };
        let panels = whole.all_panels();
        let (tiles, lanes) = (whole.tiles(), whole.groups() * LANES);
        let scale_bytes = if self.has_bf16_scales() { 2 } else { 4 };
        let zero_bytes = usize::from(self.has_zeros());
        let panel_bytes = tiles * size_of::<Tile>() + lanes * (scale_bytes + zero_bytes);
        whole.codes.reserve(panels * tiles);
        whole.zeros.reserve(panels * lanes * zero_bytes);
        for part in parts {
            let count = part.len().checked_div(panel_bytes).unwrap_or(0);
            let (codes, rest) = part.split_at(count * tiles * size_of::<Tile>());
            let (scales, zeros) = rest.split_at(count * lanes * scale_bytes);
            whole.codes.extend(codes.as_chunks::<64>().0.iter().map(|&tile| Tile(tile)));
            match &mut whole.scales {
                Scales::Bf16(to) => to.extend(scales.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b))),
                Scales::F32(to) => to.extend(scales.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
            }
            whole.zeros.extend_from_slice(zeros);
        }
        assert_eq!(whole.codes.len(), panels * tiles, "the parts make up the stack");
        assert_eq!(whole.scales.len(), panels * lanes, "the parts make up the stack");
        whole
    }
}
