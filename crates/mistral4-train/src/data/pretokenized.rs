//! `pretokenized_jsonl`: rows that are tokens already.

use std::path::PathBuf;

use serde::Deserialize;

use super::jsonl::{JsonlFiles, Line};
use super::{Dataset, IGNORE_INDEX, Sample};
use crate::error::Result;

/// Rows `{"input_ids": [..], "labels": [..]}`.
pub struct PretokenizedJsonl {
    rows: JsonlFiles,
    unshifted: bool,
    vocab_size: Option<usize>,
}

/// One row. A mask must not hide anything: labels of -100 say what is not learned.
#[derive(Deserialize)]
struct Row {
    input_ids: Vec<u32>,
    labels: Vec<i64>,
    attention_mask: Option<Vec<u8>>,
}

impl PretokenizedJsonl {
    /// Opens the files; with `unshifted`, labels line up with inputs and are shifted here.
    ///
    /// With a `vocab_size`, ids and labels are checked against it.
    ///
    /// # Errors
    /// Files that cannot be read or hold no row.
    pub fn open(paths: &[PathBuf], unshifted: bool, vocab_size: Option<usize>) -> Result<Self> {
        Ok(Self { rows: JsonlFiles::open(paths)?, unshifted, vocab_size })
    }

    fn check(&self, line: &Line, row: &Row) -> Result<()> {
        if row.input_ids.is_empty() {
            return Err(line.error("input_ids", "a row needs at least one token"));
        }
        if row.labels.len() != row.input_ids.len() {
            let message = format!("{} labels for {} input_ids", row.labels.len(), row.input_ids.len());
            return Err(line.error("labels", message));
        }
        let size = self.vocab_size.unwrap_or(u32::MAX as usize);
        if let Some(at) = row.input_ids.iter().position(|&id| id as usize >= size) {
            let message = format!("token {} is outside of the vocabulary of {size}", row.input_ids[at]);
            return Err(line.error(format!("input_ids[{at}]"), message));
        }
        let fits = |label: i64| label == IGNORE_INDEX || (0..size as i64).contains(&label);
        if let Some(at) = row.labels.iter().position(|&label| !fits(label)) {
            let message =
                format!("label {} is neither -100 nor below the vocabulary of {size}", row.labels[at]);
            return Err(line.error(format!("labels[{at}]"), message));
        }
        if row.attention_mask.as_ref().is_some_and(|mask| mask.iter().any(|&keep| keep != 1)) {
            let message =
                "rows must come without padding (padding is made here); leave the padded tokens out";
            return Err(line.error("attention_mask", message));
        }
        Ok(())
    }
}

impl Dataset for PretokenizedJsonl {
    fn len(&self) -> usize {
        self.rows.len()
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let line = self.rows.line(index)?;
        let row: Row = line.json()?;
        self.check(&line, &row)?;
        Ok(match self.unshifted {
            true => Sample::from_unshifted(row.input_ids, row.labels),
            false => Sample { input_ids: row.input_ids, labels: row.labels, images: Vec::new() },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn open(text: &[u8], unshifted: bool) -> Result<PretokenizedJsonl> {
        let mut file = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        file.write_all(text).unwrap();
        PretokenizedJsonl::open(&[file.path().to_owned()], unshifted, Some(100))
    }

    fn message(row: &str) -> String {
        let text = format!("\n{{\"input_ids\": [1], \"labels\": [1]}}\n{row}\n");
        let error = open(text.as_bytes(), true).unwrap().get(1).err().unwrap().to_string();
        let at = error.find(".jsonl:3: ").unwrap_or_else(|| panic!("no line in {error}"));
        error[at + 10..].to_owned()
    }

    #[test]
    fn labels_are_shifted_once() {
        let row = br#"{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}"#;
        let sample = open(row, true).unwrap().get(0).unwrap();
        assert_eq!(sample.labels, [6, 7, -100]);
        assert_eq!(sample.num_label_tokens(), 2);
        let sample = open(row, false).unwrap().get(0).unwrap();
        assert_eq!(sample.labels, [-100, 6, 7]);
    }

    #[test]
    fn malformed_rows_name_line_and_field() {
        for (row, want) in [
            ("{", "field `(row)`: EOF"),
            ("[1]", "field `[0]`: invalid type: integer `1`, expected a sequence"),
            (r#"{"labels": [1]}"#, "field `(row)`: missing field `input_ids`"),
            (r#"{"input_ids": [1, "a"], "labels": [1, 2]}"#, "field `input_ids[1]`: invalid type: string"),
            (r#"{"input_ids": [1, -2], "labels": [1, 2]}"#, "field `input_ids[1]`: invalid value"),
            (r#"{"input_ids": [1, 2], "labels": [1]}"#, "field `labels`: 1 labels for 2 input_ids"),
            (r#"{"input_ids": [], "labels": []}"#, "field `input_ids`: a row needs at least one token"),
            (r#"{"input_ids": [100], "labels": [1]}"#, "field `input_ids[0]`: token 100 is outside"),
            (r#"{"input_ids": [1], "labels": [-1]}"#, "field `labels[0]`: label -1 is neither"),
            (
                r#"{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}"#,
                "field `attention_mask`: rows must come without padding",
            ),
            (r#"{"input_ids": [1], "labels": [1]} x"#, "field `(row)`: trailing characters"),
        ] {
            let got = message(row);
            assert!(got.starts_with(want), "{row}\n{got}");
        }
    }

    #[test]
    fn empty_missing_and_binary_files_are_refused() {
        assert!(open(b"\n \n", true).err().unwrap().to_string().contains("no row"));
        assert!(open(b"\xff\xfe\n", true).unwrap().get(0).err().unwrap().to_string().contains("not UTF-8"));
        assert!(PretokenizedJsonl::open(&[PathBuf::from("no/such/file")], true, None).is_err());
    }
}
