//! TensorBoard event files: scalars in protocol buffers, framed as TFRecords.
//!
//! Source: `tensorflow/core/util/event.proto`, `tensorflow/core/framework/summary.proto` and
//! `tensorflow/core/lib/io/record_writer.cc`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes the scalars of a run as TensorBoard reads them.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins a file in `folder`; a run that goes on at `first_step` begins another one, and TensorBoard drops what
    /// older files say of that step and later ones.
    ///
    /// # Errors
    /// A folder that cannot be written.
    pub fn create(folder: &Path, first_step: usize) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.to_owned(), source })?;
        let now = jiff::Timestamp::now();
        // TensorBoard reads the files of a folder in the order of their names.
        let path = folder.join(format!(
            "events.out.tfevents.{}.{:09}.mistral4.{first_step}",
            now.as_second(),
            now.subsec_nanosecond()
        ));
        let opened = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = opened.map_err(|source| Error::Write { path: path.clone(), source })?;
        let mut events = Self { path, file };
        events.record(&event(None, &string(3, b"brain.Event:2")))?;
        if first_step > 0 {
            // SessionLog { status: START }
            events.record(&event(Some(first_step), &string(7, &varint(1, 1))))?;
        }
        Ok(events)
    }

    /// Writes numbers of a step by their tags; those that are not finite are left out.
    ///
    /// # Errors
    /// A disk that fails.
    pub fn scalars<'a>(
        &mut self,
        step: usize,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values.into_iter().filter(|(_, value)| value.is_finite()) {
            // Summary.Value { tag: 1, simple_value: 2 }
            let mut entry = string(1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((value as f32).to_le_bytes());
            summary.extend(string(1, &entry));
        }
        if summary.is_empty() {
            return Ok(());
        }
        self.record(&event(Some(step), &string(5, &summary)))
    }

    /// Length, its checksum, the bytes, their checksum.
    fn record(&mut self, bytes: &[u8]) -> Result<()> {
        let length = (bytes.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(bytes.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(bytes);
        record.extend(masked_crc(bytes).to_le_bytes());
        self.file.write_all(&record).map_err(|source| Error::Write { path: self.path.clone(), source })
    }
}

/// `Event { wall_time: 1, step: 2 }` and the field that says what happened.
fn event(step: Option<usize>, what: &[u8]) -> Vec<u8> {
    let seconds = jiff::Timestamp::now().as_microsecond() as f64 * 1e-6;
    let mut event = vec![1 << 3 | 1];
    event.extend(seconds.to_le_bytes());
    if let Some(step) = step {
        event.extend(varint(2, step as u64));
    }
    event.extend(what);
    event
}

/// A field that holds a whole number.
fn varint(field: u8, number: u64) -> Vec<u8> {
    let mut bytes = vec![field << 3];
    push_varint(&mut bytes, number);
    bytes
}

/// A field that holds bytes.
fn string(field: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![field << 3 | 2];
    push_varint(&mut bytes, content.len() as u64);
    bytes.extend(content);
    bytes
}

fn push_varint(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// A checksum that differs from the plain one, which would be weak over data that hold checksums themselves.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Splits a file into records and checks their sums.
    fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(masked_crc(&bytes[..8]).to_le_bytes(), bytes[8..12]);
            let record = &bytes[12..12 + length];
            assert_eq!(masked_crc(record).to_le_bytes(), bytes[12 + length..16 + length]);
            records.push(record);
            bytes = &bytes[16 + length..];
        }
        records
    }

    #[test]
    fn records_are_framed_and_hold_the_numbers() {
        // The sum that TensorFlow's own tests give for this text.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::create(folder.path(), 300).unwrap();
        events.scalars(300, [("loss", 2.5), ("grad_norm", f64::NAN)]).unwrap();
        let bytes = std::fs::read(&events.path).unwrap();
        let records = records(&bytes);
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        assert!(records[1].ends_with(&[0x10, 0xac, 0x02, 0x3a, 2, 8, 1]));
        let value = [&[0x0a, 11, 0x0a, 4][..], b"loss", &[0x15], &2.5f32.to_le_bytes()].concat();
        assert!(records[2].ends_with(&[&[0x10, 0xac, 0x02, 0x2a, 13][..], &value].concat()));
    }
}
