//! Conversations: `messages` rows, ShareGPT `conversations`, image conversations.
//!
//! Source: NVIDIA NeMo AutoModel, `datasets/llm/chat_dataset.py` (rows) and `formatting_utils.py` (which tokens are
//! learned); the chat form itself is `mistral_common`'s.

use std::path::PathBuf;
use std::sync::Arc;

use mistral4_processor::json::Json;
use mistral4_processor::{ChatRequest, Processor, RenderOptions, Rendered, ValidationMode};

use super::jsonl::{JsonlFiles, Line};
use super::{Dataset, IGNORE_INDEX, Sample};
use crate::error::{Error, Result};
use crate::recipe::ChatDatasetConfig;

/// Rows of conversations, rendered in the chat form of the tokenizer; the assistant's turns are learned.
pub struct ChatDataset {
    rows: JsonlFiles,
    first: usize,
    count: usize,
    processor: Arc<Processor>,
    config: ChatDatasetConfig,
}

impl ChatDataset {
    /// Opens the files.
    ///
    /// # Errors
    /// Files that cannot be read or hold no row, and a split that leaves no row.
    pub fn open(config: &ChatDatasetConfig, processor: Arc<Processor>) -> Result<Self> {
        let rows = JsonlFiles::open(&config.paths)?;
        let first = config.rows.0.unwrap_or(0).min(rows.len());
        let end = config.rows.1.unwrap_or(rows.len()).min(rows.len());
        if end <= first {
            let message = format!("the split leaves no row of {}", rows.len());
            return Err(Error::Dataset { path: config.paths[0].clone(), message });
        }
        Ok(Self { first, count: end - first, rows, processor, config: config.clone() })
    }

    fn render(&self, line: &Line) -> Result<Rendered> {
        let request = request(line)?;
        let base_dir = match &self.config.media_dir {
            Some(folder) => folder.clone(),
            None => line.path.parent().map_or_else(PathBuf::new, PathBuf::from),
        };
        let options = RenderOptions {
            mode: ValidationMode::Finetuning,
            base_dir,
            mask_history: self.config.mask_history,
            mask_reasoning_content: self.config.mask_reasoning_content,
        };
        let rendered = self.processor.render(&request, &[], &options);
        rendered.map_err(|error| line.error("messages", error.to_string()))
    }
}

impl Dataset for ChatDataset {
    fn len(&self) -> usize {
        self.count
    }

    fn get(&self, index: usize) -> Result<Sample> {
        let line = self.rows.line(self.first + index)?;
        let mut rendered = self.render(&line)?;
        let longest = self.config.seq_length.filter(|_| self.config.truncation).unwrap_or(usize::MAX);
        if rendered.ids.len() > longest {
            if !rendered.images.is_empty() {
                let message = format!("{} tokens, and a row with images cannot be cut", rendered.ids.len());
                return Err(line.error("messages", message));
            }
            rendered.ids.truncate(longest);
            rendered.mask.truncate(longest);
        }
        Ok(Sample::from_rendered(rendered))
    }
}

impl Sample {
    /// A sample from a rendered conversation: position `t` learns token `t + 1` where the mask has it.
    ///
    /// The last token is left out of the inputs, as nothing follows it.
    pub fn from_rendered(rendered: Rendered) -> Self {
        let Rendered { ids, mask, images, .. } = rendered;
        let next = ids.iter().zip(&mask).skip(1);
        let labels = next.map(|(&id, &learned)| if learned { i64::from(id) } else { IGNORE_INDEX }).collect();
        let mut input_ids = ids;
        input_ids.pop();
        Self { input_ids, labels, images: images.into_iter().map(Arc::new).collect() }
    }
}

/// The conversation of a row, whichever of the three names it goes by.
fn request(line: &Line) -> Result<ChatRequest> {
    let row = Json::parse(&line.text).map_err(|error| line.error("(row)", error.to_string()))?;
    let Json::Object(mut row) = row else {
        return Err(line.error("(row)", format!("must be an object, not {}", row.type_name())));
    };
    for key in ["image", "images", "video", "videos", "audio", "audios"] {
        if row.get(key).is_some_and(|value| !value.is_null()) {
            let message = "images belong in a message's content: {\"type\": \"image\", \"path\": ..}";
            return Err(line.error(key, message));
        }
    }
    let name = ["messages", "conversations", "conversation"]
        .into_iter()
        .find(|name| row.get(*name).is_some_and(|value| !value.is_null()));
    let messages = match name {
        None => return Err(line.error("messages", "is missing (or ShareGPT's `conversations`)")),
        Some("conversations") => share_gpt(line, &row["conversations"])?,
        Some(name) => row[name].clone(),
    };
    row.insert("messages".to_owned(), messages);
    if let Some(Json::String(text)) = row.get("tools") {
        let tools = Json::parse(text)
            .map_err(|error| line.error("tools", format!("a string that is not JSON: {error}")))?;
        row.insert("tools".to_owned(), tools);
    }
    ChatRequest::from_value(&Json::Object(row)).map_err(|error| line.error("messages", error.to_string()))
}

/// ShareGPT's `[{from, value}]` as messages.
fn share_gpt(line: &Line, turns: &Json) -> Result<Json> {
    let Json::Array(turns) = turns else {
        return Err(line.error("conversations", format!("must be a list, not {}", turns.type_name())));
    };
    let messages = turns.iter().enumerate().map(|(i, turn)| {
        let from = turn.get("from").or_else(|| turn.get("role")).and_then(Json::as_str).unwrap_or("nobody");
        let role = match from {
            "system" => "system",
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "model" | "bot" => "assistant",
            other => {
                let message =
                    format!("`{other}` is none of system, human, user, gpt, assistant, chatgpt, model, bot");
                return Err(line.error(format!("conversations[{i}].from"), message));
            }
        };
        let Some(value) = turn.get("value").or_else(|| turn.get("content")) else {
            return Err(line.error(format!("conversations[{i}].value"), "is missing"));
        };
        let role = Json::String(role.to_owned());
        Ok(Json::Object(
            [("role".to_owned(), role), ("content".to_owned(), value.clone())].into_iter().collect(),
        ))
    });
    Ok(Json::Array(messages.collect::<Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mistral4_processor::SpecialTokens;
    use mistral4_processor::image::{ImageProcessor, ImageProcessorConfig};
    use mistral4_processor::tokenizer::TekkenBuilder;

    fn processor() -> Arc<Processor> {
        let file = TekkenBuilder::new(TekkenBuilder::MIN_VOCAB_SIZE).train([]).unwrap();
        let config = ImageProcessorConfig {
            patch_size: 4,
            max_height: 32,
            max_width: 32,
            ..ImageProcessorConfig::default()
        };
        Arc::new(Processor::new(file.tokenizer().unwrap(), Some(ImageProcessor::new(config))))
    }

    fn dataset(
        folder: &tempfile::TempDir,
        rows: &str,
        change: impl Fn(&mut ChatDatasetConfig),
    ) -> Result<ChatDataset> {
        let path = folder.path().join("chat.jsonl");
        std::fs::write(&path, rows).unwrap();
        let mut config = ChatDatasetConfig {
            paths: vec![path],
            rows: (None, None),
            seq_length: None,
            truncation: false,
            mask_history: false,
            mask_reasoning_content: false,
            media_dir: None,
        };
        change(&mut config);
        ChatDataset::open(&config, processor())
    }

    /// What a sample learns, as text.
    fn learned(dataset: &ChatDataset, index: usize) -> String {
        let labels = dataset.get(index).unwrap().labels;
        let ids: Vec<u32> = labels.iter().filter(|&&label| label >= 0).map(|&label| label as u32).collect();
        dataset.processor.tokenizer().decode(&ids, SpecialTokens::Keep).unwrap()
    }

    const TWO_TURNS: &str = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]}"#;

    #[test]
    fn the_assistant_is_learned_with_its_end_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let all = dataset(&folder, TWO_TURNS, |_| ()).unwrap();
        assert_eq!(learned(&all, 0), "one</s>two</s>");
        let sample = all.get(0).unwrap();
        assert_eq!(sample.input_ids.len(), sample.labels.len());
        let last = dataset(&folder, TWO_TURNS, |config| config.mask_history = true).unwrap();
        assert_eq!(learned(&last, 0), "two</s>");
    }

    #[test]
    fn every_label_is_the_next_token() {
        let folder = tempfile::tempdir().unwrap();
        let sample = dataset(&folder, TWO_TURNS, |_| ()).unwrap().get(0).unwrap();
        for t in 0..sample.labels.len() - 1 {
            assert!(
                sample.labels[t] == IGNORE_INDEX || sample.labels[t] == i64::from(sample.input_ids[t + 1])
            );
        }
    }

    #[test]
    fn share_gpt_and_openai_rows_are_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let rows = format!(
            "{}\n{}\n",
            r#"{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}"#,
            r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}"#
        );
        let both = dataset(&folder, &rows, |_| ()).unwrap();
        assert_eq!(both.get(0).unwrap(), both.get(1).unwrap());
    }

    #[test]
    fn splits_take_rows_and_truncation_cuts_them() {
        let folder = tempfile::tempdir().unwrap();
        let rows = format!("{TWO_TURNS}\n").repeat(5);
        assert_eq!(dataset(&folder, &rows, |config| config.rows = (Some(1), Some(4))).unwrap().len(), 3);
        assert!(dataset(&folder, &rows, |config| config.rows = (Some(9), None)).is_err());
        let cut = |config: &mut ChatDatasetConfig| (config.seq_length, config.truncation) = (Some(10), true);
        assert_eq!(dataset(&folder, &rows, cut).unwrap().get(0).unwrap().input_ids.len(), 9);
    }

    #[test]
    fn images_are_read_beside_the_data_file() {
        let folder = tempfile::tempdir().unwrap();
        image::GrayImage::new(16, 8).save(folder.path().join("dot.png")).unwrap();
        let row = |part: &str| {
            format!(
                r#"{{"conversation": [{{"role": "user", "content": [{part}, {{"type": "text", "text": "?"}}]}}, {{"role": "assistant", "content": "dot"}}]}}"#
            )
        };
        let rows = dataset(&folder, &row(r#"{"type": "image", "path": "dot.png"}"#), |_| ()).unwrap();
        let sample = rows.get(0).unwrap();
        assert_eq!((sample.images[0].height, sample.images[0].width), (8, 16));
        assert_eq!(sample.input_ids.iter().filter(|&&id| id == 10).count(), 2);
        let missing = dataset(&folder, &row(r#"{"type": "image", "path": "no.png"}"#), |_| ()).unwrap();
        assert!(missing.get(0).unwrap_err().to_string().contains("chat.jsonl:1: field `messages`"));
        let cut = |config: &mut ChatDatasetConfig| (config.seq_length, config.truncation) = (Some(4), true);
        let cut = dataset(&folder, &row(r#"{"type": "image", "path": "dot.png"}"#), cut).unwrap();
        assert!(cut.get(0).unwrap_err().to_string().contains("cannot be cut"));
    }

    #[test]
    fn malformed_rows_name_line_and_field() {
        for (row, want) in [
            ("[]", "field `(row)`: must be an object"),
            ("{", "field `(row)`: "),
            ("{}", "field `messages`: is missing"),
            (r#"{"messages": "hi"}"#, "field `messages`: malformed request: `messages` must be a list"),
            (r#"{"messages": [{"role": "robot", "content": "x"}]}"#, "unknown message role \"robot\""),
            (
                r#"{"messages": [{"role": "user", "content": "x"}]}"#,
                "field `messages`: invalid message structure",
            ),
            (
                r#"{"conversations": [{"from": "observation", "value": "x"}]}"#,
                "field `conversations[0].from`",
            ),
            (r#"{"conversations": [{"from": "human"}]}"#, "field `conversations[0].value`: is missing"),
            (r#"{"conversations": 3}"#, "field `conversations`: must be a list"),
            (r#"{"messages": [], "image": "x.png"}"#, "field `image`: images belong in a message's content"),
            (r#"{"messages": [], "tools": "[{"}"#, "field `tools`: a string that is not JSON"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let error =
                dataset(&folder, &format!("\n{row}\n"), |_| ()).unwrap().get(0).unwrap_err().to_string();
            assert!(error.contains("chat.jsonl:2: ") && error.contains(want), "{row}\n{error}");
        }
    }

    #[test]
    fn tools_may_be_a_json_string() {
        let folder = tempfile::tempdir().unwrap();
        let tools = r#"[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]"#;
        let messages =
            r#""messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]"#;
        let quoted = serde_json::to_string(tools).unwrap();
        let rows = format!(
            "{{{messages}, \"tools\": {tools}}}\n{{{messages}, \"tools\": {quoted}}}\n{{{messages}}}"
        );
        let rows = dataset(&folder, &rows, |_| ()).unwrap();
        assert_eq!(rows.get(0).unwrap(), rows.get(1).unwrap());
        assert!(rows.get(0).unwrap().input_ids.len() > rows.get(2).unwrap().input_ids.len());
    }
}
