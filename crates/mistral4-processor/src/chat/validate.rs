//! The rules for conversations, by version.
//!
//! Source: `mistral_common` 1.13.1, `protocol/instruct/validator.py`.

use std::collections::HashSet;

use super::request::{ChatRequest, Content, Message, Part, Refusal, ToolCall, ValidationMode};
use super::schema;
use crate::tokenizer::TokenizerVersion;
use crate::{Error, Result};

/// Stands for a call id that the request did not give.
const NO_CALL_ID: &str = "null";

const NO_CALL_ID_REASON: &str =
    "Tool call id must be a non-empty string other than 'null' for tokenizer version 13 or newer.";

/// Checks a request against the rules of a version.
///
/// # Errors
/// [`Error::Refused`] with the first rule that is broken, in `mistral_common`'s order: the order of roles, then the
/// content of each message, then tools, then settings.
pub fn validate(request: &ChatRequest, version: TokenizerVersion, mode: ValidationMode) -> Result<()> {
    let rules = Rules { version, mode };
    rules.structure(&request.messages)?;
    for (index, message) in request.messages.iter().enumerate() {
        rules.message(message, index + 1 == request.messages.len())?;
    }
    for tool in &request.tools {
        if let Some(problem) = schema::problem(&tool.parameters) {
            return Err(Error::refused(Refusal::ToolSchema, format!("Invalid tool schema: {problem}")));
        }
        function_name(&tool.name, Refusal::Tool)?;
    }
    if let Some(effort) = request.reasoning_effort
        && version < TokenizerVersion::V15
    {
        let reason = format!("reasoning_effort='{effort}' is not supported for this model");
        return Err(Error::refused(Refusal::Request, reason));
    }
    Ok(())
}

struct Rules {
    version: TokenizerVersion,
    mode: ValidationMode,
}

fn structure_error(reason: impl Into<String>) -> Error {
    Error::refused(Refusal::MessageStructure, reason)
}

/// Python's `$` also matches before a line end at the end of the text.
fn without_final_newline(text: &str) -> &str {
    text.strip_suffix('\n').unwrap_or(text)
}

fn function_name(name: &str, refusal: Refusal) -> Result<()> {
    let plain = without_final_newline(name);
    let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if (1..=64).contains(&plain.len()) && plain.bytes().all(valid) {
        return Ok(());
    }
    let reason = format!(
        "Function name was {name} but must be a-z, A-Z, 0-9, or contain underscores and dashes, with a maximum length \
         of 64."
    );
    Err(Error::refused(refusal, reason))
}

fn nine_alphanumerics(id: &str, refusal: Refusal) -> Result<()> {
    let plain = without_final_newline(id);
    if plain.len() == 9 && plain.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(Error::refused(
        refusal,
        format!("Tool call id was {id} but must be a-z, A-Z, 0-9, with a length of 9."),
    ))
}

impl Rules {
    fn structure(&self, messages: &[Message]) -> Result<()> {
        let Some(last) = messages.last() else {
            return Err(structure_error("Conversation must have at least one message"));
        };
        if messages.len() == 1 && matches!(last, Message::Assistant { .. } | Message::Tool { .. }) {
            return Err(structure_error("Conversation must start with a user message or system message"));
        }
        if messages.len() > 1 || self.mode == ValidationMode::Finetuning {
            self.last_message(last)?;
        }
        order(messages)?;
        if self.version < TokenizerVersion::V11 {
            self.count_results(messages)
        } else {
            self.pair_results(messages)
        }
    }

    fn last_message(&self, last: &Message) -> Result<()> {
        match (self.mode, last) {
            (ValidationMode::Agnostic, _) => Ok(()),
            (ValidationMode::Finetuning, Message::Assistant { prefix: true, .. }) => {
                Err(structure_error("Cannot continue final message in finetuning mode"))
            }
            (ValidationMode::Finetuning, Message::Assistant { tool_calls, .. }) => {
                tool_calls.iter().try_for_each(|call| self.tool_call(call, true))
            }
            (ValidationMode::Finetuning, other) => {
                let reason = format!("Expected last role Assistant for finetuning but got {}", other.role());
                Err(structure_error(reason))
            }
            (_, Message::Assistant { prefix: false, .. }) => {
                let reason = "Expected last role User or Tool (or Assistant with prefix) for serving but got assistant";
                Err(structure_error(reason))
            }
            _ => Ok(()),
        }
    }

    /// Up to v7: as many results as calls before the next assistant message.
    fn count_results(&self, messages: &[Message]) -> Result<()> {
        let mut expected = 0_i64;
        for message in messages.iter().skip(1) {
            match message {
                Message::Tool { .. } => expected -= 1,
                Message::Assistant { tool_calls, .. } => {
                    if expected != 0 {
                        return Err(structure_error("Not the same number of function calls and responses"));
                    }
                    expected = tool_calls.len() as i64;
                }
                _ => {}
            }
        }
        if expected != 0 && self.mode == ValidationMode::Serving {
            return Err(structure_error("Not the same number of function calls and responses"));
        }
        if expected < 0 && self.mode == ValidationMode::Finetuning {
            return Err(structure_error("More tool responses than tool calls"));
        }
        Ok(())
    }

    /// From v11: every result names a call of the assistant message before it, each once.
    fn pair_results(&self, messages: &[Message]) -> Result<()> {
        let mut expected: HashSet<&str> = HashSet::new();
        let mut observed: HashSet<Option<&str>> = HashSet::new();
        for message in messages.iter().skip(1) {
            match message {
                Message::Tool { tool_call_id, .. } => {
                    let id = tool_call_id.as_deref();
                    let shown = id.unwrap_or("None");
                    if observed.contains(&id) {
                        return Err(structure_error(format!(
                            "Duplicate tool call id {shown} in tool results"
                        )));
                    }
                    if !id.is_some_and(|id| expected.contains(id)) {
                        return Err(structure_error(format!(
                            "Unexpected tool call id {shown} in tool results"
                        )));
                    }
                    observed.insert(id);
                }
                Message::Assistant { tool_calls, .. } => {
                    if expected.len() != observed.len() {
                        return Err(structure_error("Not the same number of function calls and responses"));
                    }
                    expected.clear();
                    observed.clear();
                    for call in tool_calls {
                        if !expected.insert(&call.id) {
                            let reason = format!("Duplicate tool call id {} in assistant message", call.id);
                            return Err(structure_error(reason));
                        }
                    }
                }
                _ => {}
            }
        }
        if expected.len() != observed.len() && self.mode == ValidationMode::Serving {
            return Err(structure_error("Not the same number of function calls and responses"));
        }
        Ok(())
    }

    fn message(&self, message: &Message, is_last: bool) -> Result<()> {
        match message {
            Message::User { content } => self.parts(content, "user", Refusal::UserMessage, |part| {
                matches!(part, Part::Text(_) | Part::Image(_))
            }),
            Message::System { content } => {
                let thinking = (TokenizerVersion::V7..TokenizerVersion::V15).contains(&self.version);
                self.parts(content, "system", Refusal::SystemPrompt, |part| match part {
                    Part::Text(_) => true,
                    Part::Thinking { .. } => thinking,
                    Part::Image(_) => false,
                })
            }
            Message::Assistant { content, tool_calls, prefix, weight } => {
                if let Some(content) = content {
                    let thinking = self.version >= TokenizerVersion::V11;
                    self.parts(content, "assistant", Refusal::AssistantMessage, |part| match part {
                        Part::Text(_) => true,
                        Part::Thinking { .. } => thinking,
                        Part::Image(_) => false,
                    })?;
                }
                let has_content = content.as_ref().is_some_and(|content| !content.is_empty());
                if self.version < TokenizerVersion::V7 && has_content != tool_calls.is_empty() {
                    let reason = "Assistant message must have either content or tool_calls, but not both.";
                    return Err(Error::refused(Refusal::AssistantMessage, reason));
                }
                tool_calls.iter().try_for_each(|call| self.tool_call(call, is_last))?;
                let weighs = matches!(self.mode, ValidationMode::Finetuning | ValidationMode::Agnostic);
                if weighs && weight.is_some_and(|weight| weight != 0.0 && weight != 1.0) {
                    let reason = "Assistant message weight must be either 0 or 1";
                    return Err(Error::refused(Refusal::AssistantMessage, reason));
                }
                if *prefix && !is_last {
                    let reason = "Assistant message with prefix True must be last message";
                    return Err(Error::refused(Refusal::AssistantMessage, reason));
                }
                Ok(())
            }
            Message::Tool { content, tool_call_id, name } => {
                let images = self.version >= TokenizerVersion::V15;
                self.parts(content, "tool", Refusal::ToolMessage, |part| match part {
                    Part::Text(_) => true,
                    Part::Image(_) => images,
                    Part::Thinking { .. } => false,
                })?;
                if let Some(name) = name {
                    function_name(name, Refusal::ToolMessage)?;
                }
                self.result_id(tool_call_id.as_deref())
            }
        }
    }

    fn parts(
        &self,
        content: &Content,
        role: &str,
        refusal: Refusal,
        allowed: impl Fn(&Part) -> bool,
    ) -> Result<()> {
        let mut invalid: Vec<&str> =
            content.parts().iter().filter(|part| !allowed(part)).map(Part::class_name).collect();
        invalid.sort_unstable();
        invalid.dedup();
        if invalid.is_empty() {
            return Ok(());
        }
        let reason = format!("Unexpected content chunk types in {role} message: {}", invalid.join(", "));
        Err(Error::refused(refusal, reason))
    }

    fn result_id(&self, id: Option<&str>) -> Result<()> {
        if self.version >= TokenizerVersion::V13 {
            return match id {
                None | Some("" | NO_CALL_ID) => Err(Error::refused(Refusal::ToolMessage, NO_CALL_ID_REASON)),
                Some(_) => Ok(()),
            };
        }
        match id {
            None => Err(Error::refused(Refusal::Request, "Tool call id has to be defined.")),
            Some(id) => nine_alphanumerics(id, Refusal::ToolMessage),
        }
    }

    fn tool_call(&self, call: &ToolCall, is_last: bool) -> Result<()> {
        self.call_id(&call.id, is_last)?;
        function_name(&call.name, Refusal::FunctionCall)
    }

    fn call_id(&self, id: &str, is_last: bool) -> Result<()> {
        let refuse = |reason: String| Err(Error::refused(Refusal::FunctionCall, reason));
        if self.version >= TokenizerVersion::V13 {
            return if id.is_empty() || id == NO_CALL_ID {
                refuse(NO_CALL_ID_REASON.to_owned())
            } else {
                Ok(())
            };
        }
        if id != NO_CALL_ID {
            return nine_alphanumerics(id, Refusal::FunctionCall);
        }
        match self.mode {
            ValidationMode::Finetuning | ValidationMode::Agnostic if is_last => Ok(()),
            ValidationMode::Finetuning | ValidationMode::Agnostic => refuse(
                "Tool call id of assistant message that is not last has to be defined in training."
                    .to_owned(),
            ),
            ValidationMode::Serving => refuse("Tool call id has to be defined in serving mode.".to_owned()),
            ValidationMode::Test => refuse(
                "Tool call id 'null' is only allowed for the last assistant message in finetuning mode."
                    .to_owned(),
            ),
        }
    }
}

fn order(messages: &[Message]) -> Result<()> {
    for pair in messages.windows(2) {
        let allowed = match (&pair[0], &pair[1]) {
            (Message::System { .. } | Message::User { .. }, next) => !matches!(next, Message::Tool { .. }),
            (Message::Assistant { .. } | Message::Tool { .. }, next) => {
                !matches!(next, Message::System { .. })
            }
        };
        if !allowed {
            let reason = format!("Unexpected role '{}' after role '{}'", pair[1].role(), pair[0].role());
            return Err(structure_error(reason));
        }
    }
    Ok(())
}
