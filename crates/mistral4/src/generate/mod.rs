//! Generation of token ids: greedy or sampled, one prompt or a batch. Text is the caller's business.

#[cfg(feature = "flex")]
mod decoder;
#[cfg(not(feature = "flex"))]
#[path = "no_decoder.rs"]
mod decoder;
mod sampler;

use std::ops::ControlFlow;

pub use decoder::Decoder;
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
    /// What goes on with a single row behind its prompt, where the model is fit for it.
    decoder: Option<Decoder>,
    rows: Vec<Row>,
    /// Row and token of the last step.
    added: Vec<(usize, u32)>,
    /// Tokens that the next step feeds, one a row; the padded prompts before the first.
    next: Option<Vec<u32>>,
    prompts: Vec<Request>,
}

/// Tokens that a row has memory for beforehand at most.
const MOST_FORESEEN: usize = 4096;

struct Row {
    sampler: Sampler,
    /// Prompt and answer.
    tokens: Vec<u32>,
    prompt_length: usize,
    max_new_tokens: usize,
    stop_tokens: Vec<u32>,
    done: bool,
}

impl Row {
    fn new(request: &Request) -> Result<Self> {
        let mut tokens =
            Vec::with_capacity(request.input_ids.len() + request.max_new_tokens.min(MOST_FORESEEN));
        tokens.extend_from_slice(&request.input_ids);
        Ok(Self {
            sampler: Sampler::new(request.sampling.clone())?,
            tokens,
            prompt_length: request.input_ids.len(),
            max_new_tokens: request.max_new_tokens,
            stop_tokens: request.stop_tokens.clone(),
            done: request.max_new_tokens == 0,
        })
    }

    fn last(&self) -> u32 {
        *self.tokens.last().expect("prompts are not empty")
    }

    /// Where the last token stands.
    fn position(&self) -> i64 {
        self.tokens.len() as i64 - 1
    }

    /// Appends a token; `logits` are overwritten.
    fn add(&mut self, logits: &mut [f32]) -> u32 {
        let token = self.sampler.choose(logits, &self.tokens);
        self.tokens.push(token);
        let length = self.tokens.len() - self.prompt_length;
        self.done = length >= self.max_new_tokens || self.stop_tokens.contains(&token);
        token
    }
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
        let rows = requests.iter().map(Row::new).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            model,
            cache: LatentCache::new(),
            decoder: None,
            added: Vec::with_capacity(rows.len()),
            rows,
            next: None,
            prompts: requests,
        })
    }

    /// Adds one token to every unfinished row; returns `(row, token)` pairs, empty when all rows are done.
    ///
    /// # Errors
    /// Prompts that the model refuses.
    pub fn step(&mut self) -> Result<&[(usize, u32)]> {
        self.added.clear();
        if self.rows.iter().all(|row| row.done) {
            return Ok(&self.added);
        }
        if let Some(decoder) = &mut self.decoder {
            let row = &mut self.rows[0];
            let token = row.add(decoder.step(row.last(), row.position())?);
            self.added.push((0, token));
            return Ok(&self.added);
        }
        let is_prompt = self.next.is_none();
        let inputs = self.inputs()?;
        let options = ForwardOptions { logits_to_keep: LogitsToKeep::Last(1), ..Default::default() };
        let logits = self.model.prefill(&inputs, &mut self.cache, &options)?.logits;
        let logits = logits.expect("logits of the last position were asked for");
        let [batch, vocab] = logits.dims();
        let mut logits: Vec<f32> =
            logits.into_data_as::<f32>().try_into_vec::<f32>().expect("the tensor was just converted to f32");
        let mut next = Vec::with_capacity(batch);
        for (index, (row, logits)) in self.rows.iter_mut().zip(logits.chunks_exact_mut(vocab)).enumerate() {
            if !row.done {
                self.added.push((index, row.add(logits)));
            }
            next.push(row.last());
        }
        self.next = Some(next);
        if let ([row], true) = (&self.rows[..], is_prompt) {
            self.decoder = Decoder::take_over(self.model, &mut self.cache, row.max_new_tokens);
        }
        Ok(&self.added)
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
            // A finished row repeats its last token at a position of its own, which nobody reads.
            let positions = self.rows.iter().map(Row::position).collect();
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
        let stopped = added.iter().any(|&(_, token)| on_token(token).is_break());
        if stopped || generation.rows.iter().all(|row| row.done) {
            return Ok(generation.generated(0).to_vec());
        }
    }
}
