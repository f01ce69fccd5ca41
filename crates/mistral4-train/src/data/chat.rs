//! Conversations: `messages` rows, ShareGPT `conversations`, image conversations.
//!
//! Source: NVIDIA NeMo AutoModel, `datasets/llm/chat_dataset.py` (rows) and `formatting_utils.py` (which tokens are
//! learned); the chat form itself is `mistral_common`'s.

use std::path::PathBuf;
use std::sync::Arc;

use mistral4_processor::json::Json;
use mistral4_processor::{ChatRequest, Processor, RenderOptions, Rendered, ValidationMode};

use super::row::{Row, RowForm};
use super::{IGNORE_INDEX, Sample, images};
use crate::error::Result;
use crate::recipe::ChatDatasetConfig;

/// Rows of conversations, rendered in the chat form of the tokenizer; the assistant's turns are learned.
pub(crate) struct ChatForm {
    pub(crate) config: ChatDatasetConfig,
    pub(crate) processor: Arc<Processor>,
}

impl RowForm for ChatForm {
    fn sample(&self, row: Row) -> Result<Sample> {
        let request = request(&row)?;
        let base_dir = match &self.config.media_dir {
            Some(folder) => folder.clone(),
            None => row.path.parent().map_or_else(PathBuf::new, PathBuf::from),
        };
        let options = RenderOptions {
            mode: ValidationMode::Finetuning,
            base_dir,
            mask_history: self.config.mask_history,
            mask_reasoning_content: self.config.mask_reasoning_content,
        };
        let rendered = self.processor.render(&request, &[], &options);
        let mut rendered = rendered.map_err(|error| row.error("messages", error.to_string()))?;
        let longest = self.config.seq_length.filter(|_| self.config.truncation).unwrap_or(usize::MAX);
        if rendered.ids.len() > longest {
            if !rendered.images.is_empty() {
                let message = format!("{} tokens, and a row with images cannot be cut", rendered.ids.len());
                return Err(row.error("messages", message));
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
fn request(row: &Row) -> Result<ChatRequest> {
    let name = ["messages", "conversations", "conversation"]
        .into_iter()
        .find(|name| row.value.get(name).is_some_and(|value| !value.is_null()));
    let Some(name) = name else {
        return Err(row.error("messages", "is missing (or ShareGPT's `conversations`)"));
    };
    let mut messages = json_column(row, name)?;
    let is_share_gpt = |turn: &Json| turn.get("from").is_some() || turn.get("value").is_some();
    let share_gpt_rows = match &messages {
        Json::Array(turns) => turns.iter().any(is_share_gpt),
        _ => name == "conversations",
    };
    if share_gpt_rows {
        messages = share_gpt(row, &messages)?;
    }
    let mut request = vec![("messages".to_owned(), images::place(row, messages)?)];
    if row.value.get("tools").is_some_and(|tools| !tools.is_null()) {
        request.push(("tools".to_owned(), json_column(row, "tools")?));
    }
    for key in ["reasoning_effort", "continue_final_message", "response_format"] {
        request.extend(row.value.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    let request = Json::Object(request.into_iter().collect());
    ChatRequest::from_value(&request).map_err(|error| row.error("messages", error.to_string()))
}

/// A column that holds JSON, or its text.
fn json_column(row: &Row, name: &str) -> Result<Json> {
    match &row.value.get(name) {
        Some(Json::String(text)) => {
            Json::parse(text).map_err(|error| row.error(name, format!("a string that is not JSON: {error}")))
        }
        Some(value) => Ok((*value).clone()),
        None => Ok(Json::Null),
    }
}

/// ShareGPT's `[{from, value}]` as messages.
fn share_gpt(row: &Row, turns: &Json) -> Result<Json> {
    let Json::Array(turns) = turns else {
        return Err(row.error("conversations", format!("must be a list, not {}", turns.type_name())));
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
                return Err(row.error(format!("conversations[{i}].from"), message));
            }
        };
        let Some(value) = turn.get("value").or_else(|| turn.get("content")) else {
            return Err(row.error(format!("conversations[{i}].value"), "is missing"));
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
    use crate::data::{DataSource, Dataset, row};
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
    ) -> Result<Arc<dyn Dataset>> {
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
        let (paths, rows) = (config.paths.clone(), config.rows);
        match row::open(&paths, rows, Arc::new(ChatForm { config, processor: processor() }))? {
            DataSource::Indexed(data) => Ok(data),
            DataSource::Streamed(_) => panic!("JSONL is indexed"),
        }
    }

    /// What a sample learns, as text.
    fn learned(dataset: &Arc<dyn Dataset>, index: usize) -> String {
        let labels = dataset.get(index).unwrap().labels;
        let ids: Vec<u32> = labels.iter().filter(|&&label| label >= 0).map(|&label| label as u32).collect();
        processor().tokenizer().decode(&ids, SpecialTokens::Keep).unwrap()
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

    /// However a row names its image, it is the same sample.
    #[test]
    fn images_stand_in_parts_in_columns_or_at_markers() {
        let folder = tempfile::tempdir().unwrap();
        let picture = folder.path().join("dot.png");
        image::GrayImage::new(16, 8).save(&picture).unwrap();
        let bytes = base64(&std::fs::read(&picture).unwrap());
        let answer = r#"{"role": "assistant", "content": "dot"}"#;
        let parts = |image: &str| {
            format!(
                r#""messages": [{{"role": "user", "content": [{image}, {{"type": "text", "text": "what?"}}]}}, {answer}]"#
            )
        };
        let text = |text: &str| format!(r#""messages": [{{"role": "user", "content": "{text}"}}, {answer}]"#);
        let bare = parts(r#"{"type": "image"}"#);
        let rows = [
            parts(r#"{"type": "image", "path": "dot.png"}"#),
            parts(r#"{"type": "image", "image": "dot.png"}"#),
            parts(&format!(r#"{{"type": "image", "image": "{bytes}"}}"#)),
            parts(&format!(r#"{{"type": "image", "image": {{"bytes": "{bytes}", "path": null}}}}"#)),
            parts(&format!(
                r#"{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,{bytes}"}}}}"#
            )),
            format!(r#"{bare}, "image": "dot.png""#),
            format!(r#"{bare}, "images": [{{"bytes": "{bytes}", "path": "x.png"}}]"#),
            format!(r#"{}, "images": ["dot.png"]"#, text(r"<image>\nwhat?")),
            format!(r#"{}, "image": {{"path": "dot.png"}}"#, text("what?")),
            r#""conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "dot"}], "image": "dot.png""#.to_owned(),
        ];
        let text: String = rows.iter().map(|row| format!("{{{row}}}\n")).collect();
        let data = dataset(&folder, &text, |_| ()).unwrap();
        let first = data.get(0).unwrap();
        assert_eq!(first.images.len(), 1);
        for (index, row) in rows.iter().enumerate() {
            assert_eq!(data.get(index).unwrap(), first, "{row}");
        }
    }

    fn base64(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let mut text = String::new();
        for group in bytes.chunks(3) {
            let bits =
                group.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
            for digit in 0..4 {
                let value = (bits >> (18 - 6 * digit)) & 63;
                text.push(if digit <= group.len() { char::from(DIGITS[value as usize]) } else { '=' });
            }
        }
        text
    }

    #[test]
    fn messages_may_be_a_json_string() {
        let folder = tempfile::tempdir().unwrap();
        let messages = &TWO_TURNS[r#"{"messages": "#.len()..TWO_TURNS.len() - 1];
        let quoted = serde_json::to_string(messages).unwrap();
        let rows = dataset(&folder, &format!("{TWO_TURNS}\n{{\"messages\": {quoted}}}"), |_| ()).unwrap();
        assert_eq!(rows.get(0).unwrap(), rows.get(1).unwrap());
    }

    #[test]
    fn malformed_rows_name_line_and_field() {
        for (row, want) in [
            ("[]", "field `(row)`: must be an object"),
            ("{", "field `(row)`: "),
            ("{}", "field `messages`: is missing"),
            (r#"{"messages": "hi"}"#, "field `messages`: a string that is not JSON"),
            (r#"{"messages": {}}"#, "field `messages`: malformed request: `messages` must be a list"),
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
            (r#"{"messages": [], "image": "x.png"}"#, "field `images`: no user message to put them in"),
            (
                r#"{"messages": [{"role": "user", "content": "<image><image>"}], "image": "x.png"}"#,
                "field `images`: 1 images for 2 places",
            ),
            (r#"{"messages": [], "image": 3}"#, "field `image`: an image is a path, a data URL"),
            (
                r#"{"messages": [], "videos": ["a.mp4"]}"#,
                "field `videos`: the model sees images and text only",
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}]}"#,
                "field `messages[0].content[0]`: `https://a.b/c.png`: images are not fetched",
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}"#,
                "field `messages[0].content[0]`: `http://a`: images are not fetched",
            ),
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
