//! Writing turns as token ids.
//!
//! Source: `mistral_common` 1.13.1, `tokens/tokenizers/instruct.py` and `model_settings_builder.py`.

use indexmap::IndexMap;

use super::normalize::{Normalized, normalize, parse_json};
use super::request::{
    ChatRequest, Content, ImageSource, Message, Part, Refusal, ResponseFormat, Tool, ToolCall, ValidationMode,
};
use super::validate::validate;
use crate::image::TokenGrid;
use crate::json::Json;
use crate::tokenizer::{Tokenizer, TokenizerVersion};
use crate::{Error, Result};

/// What a token of a rendered conversation is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// What the model is given: control tokens, system, user and tool turns, settings.
    Prompt,
    /// What the model wrote: answers, tool calls and the end token of its turn.
    Assistant,
    /// Thinking inside an assistant turn, its two control tokens included.
    AssistantThinking,
}

/// A conversation as token ids.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RenderedChat {
    /// The token ids, the begin token first.
    pub ids: Vec<u32>,
    /// What each token is part of, one for each id.
    pub kinds: Vec<TokenKind>,
    /// The images in the order of their placeholders.
    pub images: Vec<ImageSource>,
    /// The training weight of each assistant turn with the place of its tokens in `ids`.
    turns: Vec<(std::ops::Range<usize>, f64)>,
}

impl RenderedChat {
    /// Which tokens the model learns to write: assistant turns with their end tokens.
    ///
    /// `mask_history` keeps the last assistant turn only, `mask_reasoning_content` leaves thinking out, a turn of
    /// weight 0 is left out.
    pub fn mask(&self, mask_history: bool, mask_reasoning_content: bool) -> Vec<bool> {
        let mut mask = vec![false; self.ids.len()];
        let skipped = if mask_history { self.turns.len().saturating_sub(1) } else { 0 };
        for (range, weight) in self.turns.iter().skip(skipped) {
            for place in range.clone() {
                let thinking = self.kinds[place] == TokenKind::AssistantThinking;
                mask[place] = *weight != 0.0 && !(thinking && mask_reasoning_content);
            }
        }
        mask
    }

    fn push(&mut self, id: u32, kind: TokenKind) {
        self.ids.push(id);
        self.kinds.push(kind);
    }
}

/// Finds out how many placeholder tokens an image takes.
pub type ImagePlaceholders<'a> = dyn FnMut(&ImageSource) -> Result<TokenGrid> + 'a;

/// The chat form of one tokenizer.
#[derive(Debug, Clone, Copy)]
pub struct ChatRenderer<'t> {
    tokenizer: &'t Tokenizer,
}

impl<'t> ChatRenderer<'t> {
    /// The chat form of the tokenizer's version.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer }
    }

    /// Checks, normalises and renders a conversation up to where the assistant answers, or, in training, to its end.
    ///
    /// `placeholders` is asked for every image, in the order of the rendered placeholders.
    ///
    /// # Errors
    /// [`Error::Refused`] where `mistral_common` refuses, [`Error::MissingControlToken`] when the tokenizer lacks a
    /// control token of its version, and whatever `placeholders` returns.
    pub fn render(
        &self,
        request: &ChatRequest,
        mode: ValidationMode,
        placeholders: &mut ImagePlaceholders,
    ) -> Result<RenderedChat> {
        let version = self.tokenizer.version();
        validate(request, version, mode)?;
        let split_by_weight = matches!(mode, ValidationMode::Finetuning | ValidationMode::Agnostic);
        let Normalized { system_prompt, messages } = normalize(&request.messages, version, split_by_weight)?;
        let settings = self.settings(request)?;
        let mut writer = Writer {
            tokenizer: self.tokenizer,
            version,
            placeholders,
            kind: TokenKind::Prompt,
            out: RenderedChat::default(),
        };
        writer.out.push(self.tokenizer.bos(), TokenKind::Prompt);

        let is_user = |message: &Message| matches!(message, Message::User { .. });
        let first_user = messages.iter().position(is_user);
        let last_user = messages.iter().rposition(is_user);
        let settings_at = if version >= TokenizerVersion::V13 { first_user } else { last_user };
        for (index, message) in messages.iter().enumerate() {
            match message {
                Message::System { content } => writer.system(content)?,
                Message::User { content } => {
                    if settings_at == Some(index) {
                        writer.tools(&request.tools)?;
                        writer.settings(settings.as_deref())?;
                    }
                    let prompt = system_prompt.as_deref().filter(|_| last_user == Some(index));
                    writer.user(content, prompt)?;
                }
                Message::Assistant { content, tool_calls, prefix, weight } => {
                    let start = writer.out.ids.len();
                    writer.assistant(content.as_ref(), tool_calls, *prefix)?;
                    writer.out.turns.push((start..writer.out.ids.len(), weight.unwrap_or(1.0)));
                }
                Message::Tool { content, tool_call_id, .. } => {
                    writer.tool_result(content, tool_call_id.as_deref().unwrap_or_default())?;
                }
            }
        }
        Ok(writer.out)
    }

    /// The settings as JSON text, for versions that have them and models that offer any.
    fn settings(&self, request: &ChatRequest) -> Result<Option<String>> {
        if self.tokenizer.version() < TokenizerVersion::V15 {
            return Ok(None);
        }
        let refuse = |reason: String| Err(Error::refused(Refusal::Request, reason));
        let Some(builder) = self.tokenizer.model_settings_builder() else {
            return refuse(
                "model_settings_builder must not be None: the tokenizer file offers no settings".to_owned(),
            );
        };
        let mut settings = IndexMap::new();
        if builder.json_schema.is_some() {
            match &request.response_format {
                ResponseFormat::Text => {}
                ResponseFormat::JsonObject => {
                    settings.insert("json_schema".to_owned(), object_or_array());
                }
                ResponseFormat::JsonSchema(schema) => {
                    settings.insert("json_schema".to_owned(), schema.clone());
                }
            }
        }
        if let Some(builder) = &builder.reasoning_effort {
            let effort = request.reasoning_effort.unwrap_or(builder.default);
            if !builder.values.contains(&effort) {
                let offered: Vec<&str> = builder.values.iter().map(|value| value.as_str()).collect();
                return refuse(format!(
                    "reasoning_effort should be one of {}, got {effort}.",
                    offered.join(", ")
                ));
            }
            settings.insert("reasoning_effort".to_owned(), Json::from(effort.as_str()));
        }
        Ok((!settings.is_empty()).then(|| Json::Object(settings).dump()))
    }
}

fn object_or_array() -> Json {
    let of = |kind: &str| Json::Object(IndexMap::from([("type".to_owned(), Json::from(kind))]));
    Json::Object(IndexMap::from([("anyOf".to_owned(), Json::Array(vec![of("object"), of("array")]))]))
}

fn tool_json(tool: &Tool) -> Json {
    let function = IndexMap::from([
        ("name".to_owned(), Json::from(tool.name.as_str())),
        ("description".to_owned(), Json::from(tool.description.as_str())),
        ("parameters".to_owned(), tool.parameters.clone()),
    ]);
    Json::Object(IndexMap::from([
        ("type".to_owned(), Json::from("function")),
        ("function".to_owned(), Json::Object(function)),
    ]))
}

/// A JSON text as a value, anything else as a string.
fn value_or_string(text: &str) -> Result<Json> {
    Ok(parse_json(text)?.unwrap_or_else(|| Json::from(text)))
}

struct Writer<'a, 'p> {
    tokenizer: &'a Tokenizer,
    version: TokenizerVersion,
    placeholders: &'a mut ImagePlaceholders<'p>,
    /// What the tokens being written are part of.
    kind: TokenKind,
    out: RenderedChat,
}

impl Writer<'_, '_> {
    fn control_id(&self, name: &str) -> Result<u32> {
        self.tokenizer.special_id(name).ok_or_else(|| Error::MissingControlToken {
            path: self.tokenizer.path().to_owned(),
            name: name.to_owned(),
            version: self.version.to_string(),
        })
    }

    fn control(&mut self, name: &str) -> Result<()> {
        let id = self.control_id(name)?;
        self.out.push(id, self.kind);
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<()> {
        self.tokenizer.encode_into(text, &mut self.out.ids)?;
        self.out.kinds.resize(self.out.ids.len(), self.kind);
        Ok(())
    }

    fn tools(&mut self, tools: &[Tool]) -> Result<()> {
        if tools.is_empty() {
            return Ok(());
        }
        let json = Json::Array(tools.iter().map(tool_json).collect());
        self.control("[AVAILABLE_TOOLS]")?;
        self.text(&json.dump())?;
        self.control("[/AVAILABLE_TOOLS]")
    }

    fn settings(&mut self, settings: Option<&str>) -> Result<()> {
        let Some(settings) = settings else { return Ok(()) };
        self.control("[MODEL_SETTINGS]")?;
        self.text(settings)?;
        self.control("[/MODEL_SETTINGS]")
    }

    fn system(&mut self, content: &Content) -> Result<()> {
        self.control("[SYSTEM_PROMPT]")?;
        match content {
            Content::Text(text) => self.text(text)?,
            Content::Parts(parts) => self.parts(parts)?,
        }
        self.control("[/SYSTEM_PROMPT]")
    }

    fn user(&mut self, content: &Content, system_prompt: Option<&str>) -> Result<()> {
        let system_prompt =
            system_prompt.filter(|prompt| !prompt.is_empty()).map(|prompt| format!("{prompt}\n\n"));
        let system_prompt = system_prompt.unwrap_or_default();
        self.control("[INST]")?;
        match content {
            Content::Text(text) => self.text(&(system_prompt + text))?,
            Content::Parts(parts) => {
                self.text(&system_prompt)?;
                // An image that follows nothing but text goes before it.
                match parts.split_last() {
                    Some((image @ Part::Image(_), texts))
                        if !texts.is_empty() && texts.iter().all(|part| matches!(part, Part::Text(_))) =>
                    {
                        self.parts(std::slice::from_ref(image))?;
                        self.parts(texts)?;
                    }
                    _ => self.parts(parts)?,
                }
            }
        }
        self.control("[/INST]")
    }

    fn parts(&mut self, parts: &[Part]) -> Result<()> {
        for part in parts {
            match part {
                Part::Text(text) => self.text(text)?,
                Part::Image(source) => self.image(source)?,
                Part::Thinking { thinking, closed } => self.thinking(thinking, *closed)?,
            }
        }
        Ok(())
    }

    /// One `[IMG]` for each image token, `[IMG_BREAK]` after each row, `[IMG_END]` after the last.
    fn image(&mut self, source: &ImageSource) -> Result<()> {
        let grid = (self.placeholders)(source)?;
        let (image, line_break, end) =
            (self.control_id("[IMG]")?, self.control_id("[IMG_BREAK]")?, self.control_id("[IMG_END]")?);
        for row in 1..=grid.rows {
            for _ in 0..grid.columns {
                self.out.push(image, self.kind);
            }
            self.out.push(if row == grid.rows { end } else { line_break }, self.kind);
        }
        self.out.images.push(source.clone());
        Ok(())
    }

    fn thinking(&mut self, thinking: &str, closed: bool) -> Result<()> {
        if self.version < TokenizerVersion::V13 {
            return Err(Error::refused(Refusal::ChatForm, "Think not implemented for tokenizer < V13."));
        }
        let outer = self.kind;
        if outer == TokenKind::Assistant {
            self.kind = TokenKind::AssistantThinking;
        }
        self.control("[THINK]")?;
        self.text(thinking)?;
        if closed {
            self.control("[/THINK]")?;
        }
        self.kind = outer;
        Ok(())
    }

    fn assistant(&mut self, content: Option<&Content>, calls: &[ToolCall], prefix: bool) -> Result<()> {
        let content = content.filter(|content| !content.is_empty());
        if content.is_none() && calls.is_empty() {
            return Err(Error::refused(
                Refusal::ChatForm,
                "Invalid assistant message: neither content nor tool calls",
            ));
        }
        if self.version < TokenizerVersion::V7 && content.is_some() && !calls.is_empty() {
            let reason = "Cannot have tool calls and content defined in the same assistant message";
            return Err(Error::refused(Refusal::ChatForm, reason));
        }
        self.kind = TokenKind::Assistant;
        match content {
            None => {}
            Some(Content::Text(text)) => self.text(text.trim_end_matches(' '))?,
            Some(Content::Parts(parts)) => self.parts(parts)?,
        }
        if self.version >= TokenizerVersion::V11 {
            calls.iter().try_for_each(|call| self.tool_call(call))?;
        } else if !calls.is_empty() {
            self.tool_call_list(calls)?;
        }
        if !prefix {
            self.out.push(self.tokenizer.eos(), TokenKind::Assistant);
        }
        self.kind = TokenKind::Prompt;
        Ok(())
    }

    /// From v11: name and arguments between control tokens; v11 also writes the call's id.
    fn tool_call(&mut self, call: &ToolCall) -> Result<()> {
        self.control("[TOOL_CALLS]")?;
        self.text(&call.name)?;
        if self.version == TokenizerVersion::V11 && has_id(call) {
            self.control("[CALL_ID]")?;
            self.text(&call.id)?;
        }
        self.control("[ARGS]")?;
        self.text(&value_or_string(&call.arguments)?.dump())
    }

    /// Up to v7: all calls as one JSON list.
    fn tool_call_list(&mut self, calls: &[ToolCall]) -> Result<()> {
        let mut list = Vec::with_capacity(calls.len());
        for call in calls {
            let mut entry = IndexMap::from([
                ("name".to_owned(), Json::from(call.name.as_str())),
                ("arguments".to_owned(), value_or_string(&call.arguments)?),
            ]);
            if has_id(call) {
                entry.insert("id".to_owned(), Json::from(call.id.as_str()));
            }
            list.push(Json::Object(entry));
        }
        self.control("[TOOL_CALLS]")?;
        self.text(&Json::Array(list).dump())
    }

    fn tool_result(&mut self, content: &Content, call_id: &str) -> Result<()> {
        self.control("[TOOL_RESULTS]")?;
        match content {
            Content::Text(text) if self.version < TokenizerVersion::V7 => {
                let result = IndexMap::from([
                    ("content".to_owned(), value_or_string(text)?),
                    ("call_id".to_owned(), Json::from(call_id)),
                ]);
                self.text(&Json::Object(result).dump())?;
            }
            Content::Text(text) => {
                if self.version < TokenizerVersion::V13 {
                    self.text(call_id)?;
                    self.control("[TOOL_CONTENT]")?;
                }
                self.text(text)?;
            }
            Content::Parts(parts) => self.parts(parts)?,
        }
        self.control("[/TOOL_RESULTS]")
    }
}

fn has_id(call: &ToolCall) -> bool {
    !call.id.is_empty() && call.id != "null"
}
