//! Joining neighbouring messages of one role, and putting JSON in its normal form.
//!
//! Source: `mistral_common` 1.13.1, `protocol/instruct/normalize.py`.

use std::collections::HashMap;

use super::request::{Content, Message, Part, Refusal, ToolCall};
use crate::json::{Json, JsonError};
use crate::tokenizer::TokenizerVersion;
use crate::{Error, Result};

/// What stands between the texts of joined messages.
const MESSAGE_SEPARATOR: &str = "\n\n";

/// Messages ready for rendering.
pub(super) struct Normalized {
    /// The joined system prompts, which v3 puts into the last user turn; later versions keep them as messages.
    pub(super) system_prompt: Option<String>,
    /// The joined messages.
    pub(super) messages: Vec<Message>,
}

/// Normalises valid messages. `split_by_weight` keeps assistant messages of different training weight apart.
pub(super) fn normalize(
    messages: &[Message],
    version: TokenizerVersion,
    split_by_weight: bool,
) -> Result<Normalized> {
    let normalizer = Normalizer { version };
    let mut out = Vec::new();
    let mut call_ids: Vec<String> = Vec::new();
    let same_run =
        |a: &Message, b: &Message| a.role() == b.role() && !(split_by_weight && weight(a) != weight(b));
    for run in messages.chunk_by(same_run) {
        match &run[0] {
            Message::System { .. } => {
                if version >= TokenizerVersion::V7 {
                    out.extend(
                        run.iter().map(|message| Message::System { content: normalizer.join([message]) }),
                    );
                }
            }
            Message::User { .. } => out.push(Message::User { content: normalizer.join(run) }),
            Message::Assistant { .. } => {
                let joined = normalizer.assistant(run)?;
                if let Message::Assistant { tool_calls, .. } = &joined {
                    call_ids.extend(tool_calls.iter().map(|call| call.id.clone()));
                }
                out.push(joined);
            }
            Message::Tool { .. } => {
                out.extend(normalizer.tools(run, &call_ids)?);
                call_ids.clear();
            }
        }
    }
    let needs_user = version < TokenizerVersion::V7 && !matches!(out.first(), Some(Message::User { .. }));
    if out.is_empty() || needs_user {
        out.insert(0, Message::User { content: Content::Text(String::new()) });
    }
    let system_prompt =
        if version < TokenizerVersion::V7 { normalizer.system_prompt(messages) } else { None };
    Ok(Normalized { system_prompt, messages: out })
}

fn weight(message: &Message) -> Option<f64> {
    match message {
        Message::Assistant { weight, .. } => *weight,
        _ => None,
    }
}

struct Normalizer {
    version: TokenizerVersion,
}

/// Text parts that wait to be joined into one.
#[derive(Default)]
struct Joiner {
    parts: Vec<Part>,
    text: Option<String>,
}

impl Joiner {
    fn push_text(&mut self, separator: &str, text: &str) {
        match &mut self.text {
            Some(joined) => {
                joined.push_str(separator);
                joined.push_str(text);
            }
            None => self.text = Some(text.to_owned()),
        }
    }

    fn push_part(&mut self, part: &Part) {
        self.parts.extend(self.text.take().map(Part::Text));
        self.parts.push(part.clone());
    }

    fn finish(mut self) -> Content {
        if self.parts.is_empty() {
            return Content::Text(self.text.unwrap_or_default());
        }
        self.parts.extend(self.text.take().map(Part::Text));
        Content::Parts(self.parts)
    }
}

impl Normalizer {
    /// Joins the texts of messages, and the neighbouring text parts within one.
    fn join<'m>(&self, messages: impl IntoIterator<Item = &'m Message>) -> Content {
        let part_separator = if self.version >= TokenizerVersion::V15 { "" } else { MESSAGE_SEPARATOR };
        let mut joiner = Joiner::default();
        for content in messages.into_iter().filter_map(Message::content) {
            let mut separator = if joiner.text.is_some() { MESSAGE_SEPARATOR } else { part_separator };
            match content {
                Content::Text(text) if text.is_empty() => {}
                Content::Text(text) => joiner.push_text(MESSAGE_SEPARATOR, text),
                Content::Parts(parts) => {
                    for part in parts {
                        match part {
                            Part::Text(text) if text.is_empty() => {}
                            Part::Text(text) => {
                                joiner.push_text(separator, text);
                                separator = part_separator;
                            }
                            other => joiner.push_part(other),
                        }
                    }
                }
            }
        }
        joiner.finish()
    }

    fn assistant(&self, run: &[Message]) -> Result<Message> {
        let mut calls = Vec::new();
        let mut continued = false;
        for message in run {
            if let Message::Assistant { tool_calls, prefix, .. } = message {
                for call in tool_calls {
                    let arguments = normalize_json(&call.arguments)?;
                    calls.push(ToolCall { id: call.id.clone(), name: call.name.clone(), arguments });
                }
                continued |= prefix;
            }
        }
        Ok(Message::Assistant {
            content: Some(self.join(run)),
            tool_calls: calls,
            prefix: continued,
            weight: weight(&run[0]),
        })
    }

    /// Tool results one by one; from v11 in the order of the calls that they answer.
    fn tools(&self, run: &[Message], call_ids: &[String]) -> Result<Vec<Message>> {
        let mut results = Vec::with_capacity(run.len());
        for message in run {
            let Message::Tool { tool_call_id, name, .. } = message else { continue };
            let mut content = self.join([message]);
            if let Content::Text(text) = &mut content
                && self.version < TokenizerVersion::V7
            {
                *text = normalize_json(text)?;
            }
            results.push(Message::Tool { content, tool_call_id: tool_call_id.clone(), name: name.clone() });
        }
        if self.version >= TokenizerVersion::V11 {
            let places: HashMap<&str, usize> = call_ids.iter().map(String::as_str).zip(0..).collect();
            results.sort_by_key(|message| match message {
                Message::Tool { tool_call_id: Some(id), .. } => {
                    places.get(id.as_str()).copied().unwrap_or(usize::MAX)
                }
                _ => usize::MAX,
            });
        }
        Ok(results)
    }

    fn system_prompt(&self, messages: &[Message]) -> Option<String> {
        let prompts = messages.iter().filter(|message| match message {
            Message::System { content } => !content.is_empty(),
            _ => false,
        });
        let texts: Vec<String> = prompts
            .map(|message| match self.join([message]) {
                Content::Text(text) => text,
                Content::Parts(_) => unreachable!("v3 system prompts hold text only, as validation checks"),
            })
            .collect();
        (!texts.is_empty()).then(|| texts.join(MESSAGE_SEPARATOR))
    }
}

/// Reads and rewrites JSON text; what is not JSON stays as it is, nothing at all becomes `{}`.
fn normalize_json(text: &str) -> Result<String> {
    if text.is_empty() {
        return Ok("{}".to_owned());
    }
    Ok(parse_json(text)?.map_or_else(|| text.to_owned(), |json| json.dump()))
}

/// The JSON value, or nothing if the text is not JSON.
pub(super) fn parse_json(text: &str) -> Result<Option<Json>> {
    match Json::parse(text) {
        Ok(json) => Ok(Some(json)),
        Err(JsonError::Syntax { .. }) => Ok(None),
        Err(error) => Err(Error::refused(Refusal::Request, format!("JSON in a message: {error}"))),
    }
}
