//! Generation of token ids: greedy or sampled, one prompt or a batch. Text is the caller's business.

mod sampler;

use std::ops::ControlFlow;

pub use sampler::{Sampler, SamplingOptions};

use crate::error::{Error, Result};
use crate::inputs::{ForwardOptions, Images, LogitsToKeep, ModelInputs};
use crate::model::Mistral4;
use crate::model::cache::LatentCache;

/// One prompt with its wishes.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt.
    pub input_ids: Vec<u32>,
    /// Its images.
    pub images: Option<Images>,
    /// How tokens are chosen.
    pub sampling: SamplingOptions,
    /// Most tokens to add.
    pub max_new_tokens: usize,
    /// Tokens that end the answer; the one that did is its last token.
    pub stop_tokens: Vec<u32>,
}

/// A batch of prompts on its way.
///
/// Rows are padded on the left to the longest prompt; a row's tokens are the same as if it ran alone.
pub struct Generation<'a> {
    model: &'a Mistral4,
    cache: LatentCache,
    rows: Vec<Row>,
    /// Tokens that the next step feeds, one a row; the padded prompts before the first.
    next: Option<Vec<u32>>,
    prompts: Vec<Request>,
}

struct Row {
    sampler: Sampler,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt_length: usize,
    max_new_tokens: usize,
    stop_tokens: Vec<u32>,
    done: bool,
}

impl<'a> Generation<'a> {
    /// Prepares a batch.
    ///
    /// # Errors
    /// An empty batch, an empty prompt, or options outside their ranges.
    pub fn new(model: &'a Mistral4, requests: Vec<Request>) -> Result<Self> {
        if requests.is_empty() {
            return Err(Error::Unsupported("there is no prompt to continue".into()));
        }
        if let Some(row) = requests.iter().position(|r| r.input_ids.is_empty()) {
            return Err(Error::Unsupported(format!(
                "prompt {row} is empty; it needs at least a begin token"
            )));
        }
        let row = |r: &Request| {
            Ok(Row {
                sampler: Sampler::new(r.sampling.clone())?,
                tokens: r.input_ids.clone(),
                prompt_length: r.input_ids.len(),
                max_new_tokens: r.max_new_tokens,
                stop_tokens: r.stop_tokens.clone(),
                done: r.max_new_tokens == 0,
            })
        };
        let rows = requests.iter().map(row).collect::<Result<_>>()?;
        Ok(Self { model, cache: LatentCache::new(), rows, next: None, prompts: requests })
    }

    /// Adds one token to every unfinished row; returns `(row, token)` pairs, empty when all rows are done.
    ///
    /// # Errors
    /// Prompts that the model refuses.
    pub fn step(&mut self) -> Result<Vec<(usize, u32)>> {
        if self.rows.iter().all(|row| row.done) {
            return Ok(Vec::new());
        }
        let inputs = self.inputs()?;
        let options = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
        let logits = self.model.prefill(&inputs, &mut self.cache, &options)?.logits;
        let logits = logits.expect("logits of the last position were asked for");
        let [batch, vocab] = logits.dims();
        let logits: Vec<f32> =
            logits.into_data_as::<f32>().try_into_vec::<f32>().expect("the tensor was just converted to f32");
        let mut added = Vec::new();
        let mut next = Vec::with_capacity(batch);
        for (index, (row, logits)) in self.rows.iter_mut().zip(logits.chunks_exact(vocab)).enumerate() {
            if row.done {
                next.push(*row.tokens.last().expect("prompts are not empty"));
                continue;
            }
            let token = row.sampler.choose(logits, &row.tokens);
            row.tokens.push(token);
            let length = row.tokens.len() - row.prompt_length;
            row.done = length >= row.max_new_tokens || row.stop_tokens.contains(&token);
            next.push(token);
            added.push((index, token));
        }
        self.next = Some(next);
        Ok(added)
    }

    /// Ends a row early.
    pub fn stop(&mut self, row: usize) {
        self.rows[row].done = true;
    }

    /// The tokens added to a row so far.
    pub fn generated(&self, row: usize) -> &[u32] {
        let row = &self.rows[row];
        &row.tokens[row.prompt_length..]
    }

    /// The next pass: the padded prompts first, then one token a row.
    fn inputs(&mut self) -> Result<ModelInputs> {
        let batch = self.rows.len();
        if let Some(next) = self.next.take() {
            let position = |row: &Row| row.tokens.len() as i64 - 1;
            // A finished row repeats its last token at a position of its own, which nobody reads.
            let positions = self.rows.iter().map(position).collect();
            return Ok(ModelInputs::rows(next, batch).with_position_ids(positions));
        }
        let longest = self.rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let (mut ids, mut mask, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for row in &self.rows {
            let padding = longest - row.tokens.len();
            ids.extend(std::iter::repeat_n(row.tokens[0], padding).chain(row.tokens.iter().copied()));
            mask.extend(std::iter::repeat_n(false, padding).chain(row.tokens.iter().map(|_| true)));
            positions.extend(std::iter::repeat_n(0, padding).chain(0..row.tokens.len() as i64));
        }
        let inputs = ModelInputs::rows(ids, batch).with_attention_mask(mask).with_position_ids(positions);
        let images: Vec<Images> = self.prompts.iter().filter_map(|r| r.images.clone()).collect();
        self.prompts.clear();
        Ok(match Images::join(images) {
            Some(images) => inputs.with_images(images),
            None => inputs,
        })
    }
}

/// Continues one prompt, handing each token to `on_token` as it comes.
///
/// # Errors
/// A prompt that the model refuses.
pub fn generate(
    model: &Mistral4,
    request: Request,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let mut generation = Generation::new(model, vec![request])?;
    loop {
        let added = generation.step()?;
        let stopped = added.into_iter().any(|(_, token)| on_token(token).is_break());
        if stopped || generation.rows.iter().all(|row| row.done) {
            return Ok(generation.generated(0).to_vec());
        }
    }
}
