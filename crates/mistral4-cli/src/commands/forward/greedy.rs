//! Greedy continuation with the latent cache.

use burn::tensor::Device;
use mistral4::inputs::{Layout, LogitsToKeep};
use mistral4::{ForwardOptions, LatentCache, Mistral4, ModelInputs};

use super::floats;
use super::inputs::Inputs;
use crate::error::{Error, Result};

/// Continues each row by its `count` likeliest tokens; a token that ends a text does not stop it.
///
/// # Shapes
/// - output: `[B, count]`
///
/// # Errors
/// Packed input, rows without a token, or padding between tokens.
pub(super) fn continue_rows(
    model: &Mistral4,
    inputs: &Inputs,
    count: usize,
    device: &Device,
) -> Result<Vec<i64>> {
    let Layout::Rows { batch, sequence } = inputs.layout else {
        return Err(Error::input(
            "--greedy continues rows, and the input is packed",
            "give `input_ids` as [B, S]",
        ));
    };
    let rows = (0..batch).map(|row| Row::read(inputs, row, sequence)).collect::<Result<Vec<_>>>()?;
    let mut cache = LatentCache::new();
    let mut next = prompts(&rows, filler(model));
    next.images = inputs.images(device);
    let options = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
    let mut tokens = vec![0i64; batch * count];
    for step in 0..count {
        let logits = model.forward(&next, Some(&mut cache), &options)?.logits;
        let logits = floats(logits.expect("the last position's logits were asked for"));
        let chosen: Vec<u32> = logits.chunks_exact(logits.len() / batch).map(likeliest).collect();
        chosen.iter().enumerate().for_each(|(row, &token)| tokens[row * count + step] = i64::from(token));
        let positions = rows.iter().map(|row| row.next_position + step as i64).collect();
        next = ModelInputs::rows(chosen, batch).with_position_ids(positions);
    }
    Ok(tokens)
}

/// The tokens of a row without its padding.
struct Row {
    ids: Vec<u32>,
    positions: Vec<i64>,
    next_position: i64,
}

impl Row {
    fn read(inputs: &Inputs, row: usize, sequence: usize) -> Result<Self> {
        let place = row * sequence..(row + 1) * sequence;
        let all = vec![true; sequence];
        let mask = inputs.attention_mask.as_ref().map_or(all.as_slice(), |mask| &mask[place.clone()]);
        let refuse = |problem: &str| {
            Error::input(
                format!("--greedy: row {row} of `attention_mask` {problem}"),
                "give each row at least one token, with padding on its left or right only",
            )
        };
        let start = mask.iter().position(|&m| m).ok_or_else(|| refuse("holds no token"))?;
        let end = mask.iter().rposition(|&m| m).map_or(start, |last| last + 1);
        if mask[start..end].contains(&false) {
            return Err(refuse("has padding between tokens"));
        }
        let positions: Vec<i64> = match &inputs.position_ids {
            Some(positions) => positions[place.clone()][start..end].to_vec(),
            None => (0..(end - start) as i64).collect(),
        };
        let next_position = positions.last().map_or(0, |last| last + 1);
        Ok(Row { ids: inputs.input_ids[place][start..end].to_vec(), positions, next_position })
    }
}

/// A token for padding that is not the image token, whose places are counted.
fn filler(model: &Mistral4) -> u32 {
    match model {
        Mistral4::Multimodal(model) if model.image_token_index == 0 => 1,
        _ => 0,
    }
}

/// The rows side by side, padded on the left.
fn prompts(rows: &[Row], filler: u32) -> ModelInputs {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
    let (mut ids, mut mask, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let padding = longest - row.ids.len();
        ids.extend(std::iter::repeat_n(filler, padding).chain(row.ids.iter().copied()));
        mask.extend((0..longest).map(|place| place >= padding));
        positions.extend(std::iter::repeat_n(0, padding).chain(row.positions.iter().copied()));
    }
    ModelInputs::rows(ids, rows.len()).with_attention_mask(mask).with_position_ids(positions)
}

/// The index of the largest logit; among equals the lowest.
fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = index;
        }
    }
    best as u32
}
