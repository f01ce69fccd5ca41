//! Documents of one part of the data, as tokens, a chunk at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use mistral4_processor::Tokenizer;
use mistral4_processor::json::Json;

use super::jsonl::{Line, MAX_LINE};
use super::parquet::{ParquetFiles, ParquetRows};
use super::row::Row;
use crate::error::{Error, Result};

/// Bytes of a text file that are tokenised at a time.
const CHUNK: usize = 1 << 16;
/// Most bytes in which a good place to cut is looked for.
const MOST: usize = 1 << 20;

/// A part of text data: a file's bytes, or a row group.
#[derive(Debug, Clone)]
pub(super) enum PartSource {
    /// One document.
    Text { path: Arc<PathBuf>, bytes: Range<u64> },
    /// A document a line, after so many lines of the file.
    Lines { path: Arc<PathBuf>, bytes: Range<u64>, lines_before: usize, column: Arc<str> },
    /// A document a row.
    Parquet { files: ParquetFiles, group: usize, column: Arc<str> },
}

/// Tokens of a document, or of some of it.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    /// Where its text begins: byte or row.
    pub(super) position: u64,
    /// Lines before it.
    pub(super) line: usize,
    pub(super) tokens: Vec<u32>,
    pub(super) ends_document: bool,
}

/// The rest of a part.
pub(super) struct Documents {
    source: Source,
    position: u64,
    line: usize,
}

enum Source {
    Text { path: Arc<PathBuf>, file: File, bytes: Range<u64> },
    Lines { path: Arc<PathBuf>, file: BufReader<File>, end: u64, lines_before: usize, column: Arc<str> },
    Parquet { rows: ParquetRows, column: Arc<str> },
}

impl PartSource {
    /// Reads from a position (0 is the part's start).
    ///
    /// # Errors
    /// A file that cannot be read.
    pub(super) fn open(&self, position: u64, line: usize) -> Result<Documents> {
        let start = |bytes: &Range<u64>| if position == 0 { bytes.start } else { position };
        let open = |path: &Arc<PathBuf>, position| -> Result<File> {
            let failed = |source| Error::Read { path: path.as_ref().clone(), source };
            let mut file = File::open(path.as_ref()).map_err(failed)?;
            file.seek(SeekFrom::Start(position)).map_err(failed)?;
            Ok(file)
        };
        let (source, position) = match self {
            Self::Text { path, bytes } => {
                let position = start(bytes);
                let file = open(path, position)?;
                (Source::Text { path: path.clone(), file, bytes: bytes.clone() }, position)
            }
            Self::Lines { path, bytes, lines_before, column } => {
                let position = start(bytes);
                let file = BufReader::with_capacity(1 << 18, open(path, position)?);
                let (path, column, lines_before) = (path.clone(), column.clone(), *lines_before);
                (Source::Lines { path, file, end: bytes.end, lines_before, column }, position)
            }
            Self::Parquet { files, group, column } => {
                let rows = files.rows(*group, position as usize)?;
                (Source::Parquet { rows, column: column.clone() }, position)
            }
        };
        Ok(Documents { source, position, line })
    }
}

impl Documents {
    /// Where the next chunk begins, and the lines before it.
    pub(super) fn place(&self) -> (u64, usize) {
        (self.position, self.line)
    }

    /// The next chunk; `None` at the end of the part.
    ///
    /// # Errors
    /// A row without text (the next call goes on behind it), a file that cannot be read or is not UTF-8.
    pub(super) fn next(&mut self, tokenizer: &Tokenizer) -> Result<Option<Chunk>> {
        let (position, line) = (self.position, self.line);
        let chunk = |tokens, ends_document| Some(Chunk { position, line, tokens, ends_document });
        match &mut self.source {
            Source::Text { path, file, bytes } => {
                let (starts, end) = (position == bytes.start, bytes.end);
                if position >= end {
                    return Ok(None);
                }
                let text = read_chunk(path, file, position, end)?;
                let refuse = |error: mistral4_processor::Error| Error::Dataset {
                    path: path.as_ref().clone(),
                    message: error.to_string(),
                };
                self.position += text.len() as u64;
                let ends = self.position == end;
                let mut tokens = tokenizer.encode(&text).map_err(refuse)?;
                if starts {
                    tokens.insert(0, tokenizer.bos());
                }
                if ends {
                    tokens.push(tokenizer.eos());
                }
                Ok(chunk(tokens, ends))
            }
            Source::Lines { path, file, end, lines_before, column } => loop {
                if self.position >= *end {
                    return Ok(None);
                }
                let (position, line) = (self.position, self.line);
                let number = *lines_before + line + 1;
                let (text, length) = read_line(path, file, number)?;
                self.position += length;
                self.line += 1;
                let text = match text {
                    Some(text) if text.trim().is_empty() => continue,
                    Some(text) => text,
                    None => {
                        let line = Line { path: path.clone(), number, text: String::new() };
                        return Err(line.error("(row)", "not UTF-8 text"));
                    }
                };
                let row = Line { path: path.clone(), number, text }.row()?;
                let tokens = document(&row, column, tokenizer)?;
                return Ok(Some(Chunk { position, line, tokens, ends_document: true }));
            },
            Source::Parquet { rows, column } => {
                let Some(row) = rows.next() else { return Ok(None) };
                self.position += 1;
                Ok(chunk(document(&row?, column, tokenizer)?, true))
            }
        }
    }
}

/// The text of a row between the begin and the end token.
fn document(row: &Row, column: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let text = match row.value.get(column) {
        Some(Json::String(text)) => text,
        Some(other) => return Err(row.error(column, format!("must be text, not {}", other.type_name()))),
        None => return Err(row.error(column, "is missing (dataset.text_column names another one)")),
    };
    let mut tokens = vec![tokenizer.bos()];
    tokens.extend(tokenizer.encode(text).map_err(|error| row.error(column, error.to_string()))?);
    tokens.push(tokenizer.eos());
    Ok(tokens)
}

/// A line without its end, `None` if it is not UTF-8, and its length in bytes.
fn read_line(
    path: &Arc<PathBuf>,
    file: &mut BufReader<File>,
    number: usize,
) -> Result<(Option<String>, u64)> {
    let mut bytes = Vec::new();
    let read = file.take(MAX_LINE + 1).read_until(b'\n', &mut bytes);
    let length = read.map_err(|source| Error::Read { path: path.as_ref().clone(), source })? as u64;
    if length == 0 || length > MAX_LINE {
        let message = match length {
            0 => "the file has become shorter while it was read".to_owned(),
            _ => format!("line {number} is longer than {MAX_LINE} bytes"),
        };
        return Err(Error::Dataset { path: path.as_ref().clone(), message });
    }
    Ok((String::from_utf8(bytes).ok(), length))
}

/// Text from `position` to a place where the tokens of what follows do not depend on what lies before.
fn read_chunk(path: &Arc<PathBuf>, file: &mut File, position: u64, end: u64) -> Result<String> {
    let failed = |source| Error::Read { path: path.as_ref().clone(), source };
    let mut size = CHUNK;
    loop {
        let length = (end - position).min(size as u64) as usize;
        let mut bytes = vec![0; length];
        file.seek(SeekFrom::Start(position)).map_err(failed)?;
        file.read_exact(&mut bytes).map_err(failed)?;
        let is_rest = position + length as u64 == end;
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            // The last character may be cut.
            Err(error) if error.error_len().is_none() && !is_rest => {
                std::str::from_utf8(&bytes[..error.valid_up_to()]).expect("it is valid up to there")
            }
            Err(error) => {
                let message = format!("not UTF-8 text at byte {}", position + error.valid_up_to() as u64);
                return Err(Error::Dataset { path: path.as_ref().clone(), message });
            }
        };
        if is_rest {
            return Ok(text.to_owned());
        }
        if let Some(cut) = line_start(text) {
            return Ok(text[..cut].to_owned());
        }
        if size >= MOST {
            // Text without lines: a word that is cut here gets other tokens than it would have had.
            let space = text.rfind(' ').filter(|&at| at > 0);
            return Ok(text[..space.unwrap_or(text.len())].to_owned());
        }
        size *= 4;
    }
}

/// The last line's start, where no token of a Tekken vocabulary can reach over: a token that holds a line break goes on
/// with white space or `/` only.
fn line_start(text: &str) -> Option<usize> {
    let starts = text.rmatch_indices('\n').map(|(at, _)| at + 1);
    let is_start = |at: &usize| text[*at..].chars().next().is_some_and(|c| !c.is_whitespace() && c != '/');
    starts.filter(|&at| at < text.len()).find(is_start)
}

/// The first line that begins behind `position` (or the end of the file): its byte, and the lines before it.
pub(super) fn next_line(file: &File, position: u64) -> std::io::Result<(u64, usize)> {
    let mut reader = BufReader::with_capacity(1 << 18, file);
    let (mut at, mut lines) = (0, 0);
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok((at, lines));
        }
        for (i, _) in buffer.iter().enumerate().filter(|&(_, &byte)| byte == b'\n') {
            lines += 1;
            if at + i as u64 >= position {
                return Ok((at + i as u64 + 1, lines));
            }
        }
        let length = buffer.len();
        at += length as u64;
        reader.consume(length);
    }
}
