//! Two-dimensional rotary embedding: half of the frequencies turn with a patch's row, half with its column.

use burn::tensor::{DType, Device, Tensor, TensorData};

use super::Grid;

/// Cos and sin for the patches of `grids`, laid end to end.
///
/// Of the frequencies `theta^(-2i/H)`, the even ones turn with the row and the odd ones with the column.
///
/// Source: `PixtralVisionRotaryEmbedding` in transformers.
///
/// # Shapes
/// - outputs: `[P, H / 2]` f32
pub(super) fn tables(theta: f64, head_dim: usize, grids: &[Grid], device: &Device) -> (Tensor<2>, Tensor<2>) {
    let frequency = |i: usize| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
    let pairs = head_dim / 2;
    let by_row: Vec<f32> = (0..pairs).step_by(2).map(frequency).collect();
    let by_column: Vec<f32> = (1..pairs).step_by(2).map(frequency).collect();
    let patches: usize = grids.iter().map(|(h, w)| h * w).sum();
    let mut angles = Vec::with_capacity(patches * pairs);
    for &(height, width) in grids {
        for row in 0..height {
            for column in 0..width {
                angles.extend(by_row.iter().map(|f| row as f32 * f));
                angles.extend(by_column.iter().map(|f| column as f32 * f));
            }
        }
    }
    let table =
        |data: Vec<f32>| Tensor::from_data(TensorData::new(data, [patches, pairs]), (device, DType::F32));
    (table(angles.iter().map(|a| a.cos()).collect()), table(angles.iter().map(|a| a.sin()).collect()))
}
