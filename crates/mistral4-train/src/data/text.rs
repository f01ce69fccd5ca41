//! Plain text for pretraining: tokenised once and cut into blocks of one length.

use mistral4_processor::Tokenizer;

use super::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::recipe::{Split, TextDatasetConfig};

/// Part of the blocks that is held out: one in so many, at the end.
const HELD_OUT: usize = 20;

/// Blocks of running text; every token is learned from those before it in its block.
pub struct TextDataset {
    tokens: Vec<u32>,
    seq_length: usize,
    first: usize,
    count: usize,
}

impl TextDataset {
    /// Reads and tokenises the files, each as one document between the begin and the end token.
    ///
    /// # Errors
    /// Files that cannot be read or are not UTF-8, and too little text for one block.
    pub fn open(config: &TextDatasetConfig, tokenizer: &Tokenizer) -> Result<Self> {
        let mut tokens = Vec::new();
        for path in &config.paths {
            let text =
                std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.clone(), source })?;
            let ids = tokenizer
                .encode(&text)
                .map_err(|error| Error::Dataset { path: path.clone(), message: error.to_string() })?;
            tokens.push(tokenizer.bos());
            tokens.extend(ids);
            tokens.push(tokenizer.eos());
        }
        Self::cut(tokens, config)
    }

    fn cut(tokens: Vec<u32>, config: &TextDatasetConfig) -> Result<Self> {
        let blocks = tokens.len().saturating_sub(1) / config.seq_length;
        let held_out = blocks.div_ceil(HELD_OUT);
        let (first, count) = match config.split {
            None => (0, blocks),
            Some(Split::Train) => (0, blocks - held_out),
            Some(Split::Validation) => (blocks - held_out, held_out),
        };
        if count == 0 {
            let message = format!("{} tokens are too few for blocks of {}", tokens.len(), config.seq_length);
            return Err(Error::Dataset { path: config.paths.first().cloned().unwrap_or_default(), message });
        }
        Ok(Self { tokens, seq_length: config.seq_length, first, count })
    }
}

impl Dataset for TextDataset {
    fn len(&self) -> usize {
        self.count
    }

    fn get(&self, index: usize) -> Result<Sample> {
        assert!(index < self.count, "row {index} of {}", self.count);
        let start = (self.first + index) * self.seq_length;
        let block = &self.tokens[start..=start + self.seq_length];
        Ok(Sample {
            input_ids: block[..self.seq_length].to_vec(),
            labels: block[1..].iter().map(|&id| i64::from(id)).collect(),
            images: Vec::new(),
        })
    }

    fn tokens(&self, _index: usize) -> Result<usize> {
        Ok(self.seq_length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(tokens: u32, seq_length: usize, split: Option<Split>) -> Result<TextDataset> {
        let config = TextDatasetConfig { paths: vec!["t.txt".into()], seq_length, split };
        TextDataset::cut((0..tokens).collect(), &config)
    }

    #[test]
    fn blocks_cover_the_text_and_predict_the_next_token() {
        let all = blocks(41, 4, None).unwrap();
        assert_eq!(all.len(), 10);
        let last = all.get(9).unwrap();
        assert_eq!((last.input_ids, last.labels), (vec![36, 37, 38, 39], vec![37, 38, 39, 40]));
    }

    #[test]
    fn held_out_blocks_are_never_trained_on() {
        let train = blocks(401, 4, Some(Split::Train)).unwrap();
        let held_out = blocks(401, 4, Some(Split::Validation)).unwrap();
        assert_eq!((train.len(), held_out.len()), (95, 5));
        let last = *train.get(94).unwrap().input_ids.last().unwrap();
        assert_eq!(held_out.get(0).unwrap().input_ids[0], last + 1);
    }

    #[test]
    fn too_little_text_is_refused() {
        assert!(blocks(4, 4, None).err().unwrap().to_string().contains("too few for blocks of 4"));
        assert!(blocks(9, 8, Some(Split::Train)).is_err());
    }
}
