//! Plain text for pretraining: read a little at a time, and cut into pieces of one length.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use mistral4_processor::Processor;

use super::documents::{Chunk, Documents, PartSource, next_line};
use super::parquet::ParquetFiles;
use super::row::Row;
use super::stream::{SampleStream, StreamDataset, StreamPlace, StreamedSample, part_order};
use super::{Sample, paths};
use crate::error::{Error, Result};
use crate::recipe::{Split, TextDatasetConfig};

/// Share of each file that is held out: one in so many bytes or rows, at its end.
const HELD_OUT: u64 = 20;

/// Documents of text files (one a file), of JSONL lines and of Parquet rows (one a row).
///
/// Every document stands between the begin and the end token and is cut into pieces of `seq_length` tokens, the last of
/// them shorter; a token is learned from those before it in its piece. Nothing but the piece under way is in memory.
pub(crate) struct TextDataset {
    parts: Arc<[PartSource]>,
    processor: Arc<Processor>,
    seq_length: usize,
}

impl TextDataset {
    /// Opens the files.
    ///
    /// # Errors
    /// Files that cannot be read or are of another kind, and a split that leaves nothing.
    pub(crate) fn open(config: &TextDatasetConfig, processor: Arc<Processor>) -> Result<Self> {
        let column: Arc<str> = config.text_column.as_str().into();
        let mut parts = Vec::new();
        for path in paths::expand(&config.paths, &["txt", "text", "md", "jsonl", "parquet"])? {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("parquet") => {
                    let files = ParquetFiles::open(&[path], Some(&column))?;
                    let range = split(files.len() as u64, config.split);
                    let files = files.slice(range.start as usize..range.end as usize);
                    let column = &column;
                    parts.extend((0..files.parts()).map(|group| PartSource::Parquet {
                        files: files.clone(),
                        group,
                        column: column.clone(),
                    }));
                }
                Some("json") => {
                    let message =
                        "a JSON list is not read as a stream; write one object a line (.jsonl)".to_owned();
                    return Err(Error::Dataset { path, message });
                }
                extension => {
                    let (bytes, lines_before) = bytes_of(&path, config.split)?;
                    let column = column.clone();
                    let is_lines = extension == Some("jsonl");
                    let path = Arc::new(path);
                    if bytes.is_empty() {
                        continue;
                    }
                    parts.push(match is_lines {
                        true => PartSource::Lines { path, bytes, lines_before, column },
                        false => PartSource::Text { path, bytes },
                    });
                }
            }
        }
        if parts.is_empty() {
            let message = "there is no text in it, or too little for this split".to_owned();
            return Err(Error::Dataset { path: config.paths.first().cloned().unwrap_or_default(), message });
        }
        Ok(Self { parts: parts.into(), processor, seq_length: config.seq_length })
    }
}

/// The bytes or rows of a part of the data.
fn split(length: u64, split: Option<Split>) -> Range<u64> {
    let first_held_out = length - length.div_ceil(HELD_OUT);
    match split {
        None => 0..length,
        Some(Split::Train) => 0..first_held_out,
        Some(Split::Validation) => first_held_out..length,
    }
}

/// The bytes of a file that belong to a split, and the lines before them; it is cut where a line begins.
fn bytes_of(path: &Path, wanted: Option<Split>) -> Result<(Range<u64>, usize)> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    if wanted.is_none() {
        return Ok((0..length, 0));
    }
    let (cut, lines) = next_line(&file, split(length, Some(Split::Validation)).start).map_err(failed)?;
    Ok(if wanted == Some(Split::Train) { (0..cut, 0) } else { (cut..length, lines) })
}

impl StreamDataset for TextDataset {
    fn num_rows(&self) -> Option<usize> {
        None
    }

    fn read(&self, shuffle: Option<(u64, usize)>, from: StreamPlace) -> Result<Box<dyn SampleStream>> {
        Ok(Box::new(Pieces {
            order: part_order(self.parts.len(), shuffle),
            parts: self.parts.clone(),
            processor: self.processor.clone(),
            seq_length: self.seq_length,
            documents: None,
            chunks: VecDeque::new(),
            tokens: 0,
            ended: false,
            next: from,
        }))
    }

    fn sample(&self, row: Row) -> Result<Sample> {
        unreachable!("pieces are samples already, row {:?}", row.place)
    }
}

/// The pieces of documents, one after another.
struct Pieces {
    order: Vec<usize>,
    parts: Arc<[PartSource]>,
    processor: Arc<Processor>,
    seq_length: usize,
    documents: Option<Documents>,
    /// What has been read of the document under way.
    chunks: VecDeque<Chunk>,
    /// Tokens in the chunks, those of earlier samples included.
    tokens: usize,
    /// Whether the chunks reach to the document's end.
    ended: bool,
    /// Where the next sample begins, if the chunks are empty; else in the first of them.
    next: StreamPlace,
}

impl Pieces {
    /// Reads the next chunk; `false` at the end of the data.
    fn read(&mut self) -> Result<bool> {
        loop {
            let Some(&part) = self.order.get(self.next.part) else { return Ok(false) };
            let documents = match &mut self.documents {
                Some(documents) => documents,
                none => none.insert(self.parts[part].open(self.next.position, self.next.line)?),
            };
            match documents.next(self.processor.tokenizer())? {
                Some(chunk) => {
                    self.tokens += chunk.tokens.len();
                    self.ended = chunk.ends_document;
                    self.chunks.push_back(chunk);
                    return Ok(true);
                }
                None => {
                    self.documents = None;
                    self.next =
                        StreamPlace { sample: self.next.sample, ..StreamPlace::of_part(self.next.part + 1) };
                }
            }
        }
    }

    /// Forgets the rest of a document.
    fn end_document(&mut self) {
        self.chunks.clear();
        (self.tokens, self.ended, self.next.tokens) = (0, false, 0);
        if let Some(documents) = &self.documents {
            (self.next.position, self.next.line) = documents.place();
        }
    }

    /// Takes the next piece of the document under way; the token after it stays.
    fn take(&mut self, length: usize) -> Sample {
        let tokens = self.chunks.iter().flat_map(|chunk| &chunk.tokens).skip(self.next.tokens);
        let tokens: Vec<u32> = tokens.take(length + 1).copied().collect();
        self.next.tokens += length;
        while let Some(first) = self.chunks.front().filter(|chunk| chunk.tokens.len() <= self.next.tokens) {
            self.next.tokens -= first.tokens.len();
            self.tokens -= first.tokens.len();
            self.chunks.pop_front();
        }
        if let Some(first) = self.chunks.front() {
            (self.next.position, self.next.line) = (first.position, first.line);
        }
        self.next.sample += 1;
        Sample {
            input_ids: tokens[..length].to_vec(),
            labels: tokens[1..].iter().map(|&id| i64::from(id)).collect(),
            images: Vec::new(),
        }
    }
}

impl SampleStream for Pieces {
    fn next(&mut self) -> Option<Result<StreamedSample>> {
        loop {
            let left = self.tokens.saturating_sub(self.next.tokens + 1);
            if left >= self.seq_length || (self.ended && left > 0) {
                let sample = self.take(left.min(self.seq_length));
                if self.ended && self.tokens - self.next.tokens <= 1 {
                    self.end_document();
                }
                return Some(Ok(StreamedSample::Ready(sample)));
            }
            if self.ended {
                self.end_document();
            }
            match self.read() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    // The unusable row is passed over.
                    if self.documents.is_some() {
                        self.end_document();
                    }
                    self.next.sample += 1;
                    return Some(Err(error));
                }
            }
        }
    }

    fn place(&self) -> StreamPlace {
        self.next
    }
}

#[cfg(test)]
mod tests;
