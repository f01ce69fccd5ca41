//! Reading a request from JSON, with the coercions and type checks that `mistral_common`'s models make.

use indexmap::IndexMap;
use serde::de::{Deserialize, Deserializer, Error as _};

use super::request::{
    ChatRequest, Content, ImageSource, Message, Part, ReasoningEffort, Refusal, ResponseFormat, Tool,
    ToolCall,
};
use super::schema;
use crate::json::Json;
use crate::{Error, Result};

fn malformed(reason: impl Into<String>) -> Error {
    Error::refused(Refusal::Malformed, reason)
}

impl ChatRequest {
    /// Reads a request: a list of messages, or an object with `messages` and optionally `tools`, `reasoning_effort`,
    /// `response_format` and `continue_final_message`. Other keys are passed over, as OpenAI clients send many.
    ///
    /// # Errors
    /// [`Error::Refused`] when a key is missing or has the wrong type, or a role or part is unknown.
    pub fn from_json(text: &str) -> Result<Self> {
        let json =
            Json::parse(text).map_err(|error| malformed(format!("the messages are not JSON: {error}")))?;
        Self::from_value(&json)
    }

    /// Reads a request from a JSON value; see [`from_json`](Self::from_json).
    ///
    /// # Errors
    /// [`Error::Refused`] when a key is missing or has the wrong type, or a role or part is unknown.
    pub fn from_value(json: &Json) -> Result<Self> {
        let empty = IndexMap::new();
        let (list, object) = match json {
            Json::Array(list) => (list, &empty),
            Json::Object(object) => match object.get("messages") {
                Some(Json::Array(list)) => (list, object),
                Some(other) => {
                    return Err(malformed(format!("`messages` must be a list, not {}", other.type_name())));
                }
                None => return Err(malformed("`messages` is missing")),
            },
            other => {
                return Err(malformed(format!("expected a list or an object, not {}", other.type_name())));
            }
        };
        let mut supplied = 0;
        let mut messages = Vec::with_capacity(list.len());
        for (index, message) in list.iter().enumerate() {
            messages
                .push(Reader { at: format!("messages[{index}]"), supplied: &mut supplied }.message(message)?);
        }
        if let Some(value) = object.get("continue_final_message")
            && boolean(value, "continue_final_message")?
        {
            match messages.last_mut() {
                Some(Message::Assistant { prefix, .. }) => *prefix = true,
                _ => {
                    let reason = "continue_final_message=True requires final message to be an assistant.";
                    return Err(Error::refused(Refusal::MessageStructure, reason));
                }
            }
        }
        let tools = match object.get("tools") {
            None | Some(Json::Null) => Vec::new(),
            Some(Json::Array(tools)) => {
                tools.iter().enumerate().map(|(i, tool)| read_tool(i, tool)).collect::<Result<_>>()?
            }
            Some(other) => {
                return Err(malformed(format!("`tools` must be a list, not {}", other.type_name())));
            }
        };
        let reasoning_effort = match object.get("reasoning_effort") {
            None | Some(Json::Null) => None,
            Some(value) => Some(value.as_str().and_then(ReasoningEffort::parse).ok_or_else(|| {
                malformed(format!(
                    "`reasoning_effort` must be none, minimal, low, medium, high, xhigh or max, not {}",
                    value.dump()
                ))
            })?),
        };
        let response_format = match object.get("response_format") {
            None => ResponseFormat::Text,
            Some(value) => read_response_format(value)?,
        };
        Ok(Self { messages, tools, reasoning_effort, response_format })
    }

    /// The number of bare image parts, which take the images supplied beside the messages.
    pub fn supplied_images(&self) -> usize {
        let parts = self.messages.iter().filter_map(Message::content).flat_map(Content::parts);
        parts.filter(|part| matches!(part, Part::Image(ImageSource::Supplied(_)))).count()
    }
}

/// Numbers arrive as the deserializer rounds them, so [`ChatRequest::from_json`] is the exact way in for JSON text.
impl<'de> Deserialize<'de> for ChatRequest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        Self::from_value(&Json::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A boolean as pydantic takes it: `true`, 1, `"yes"` and so on.
fn boolean(value: &Json, key: &str) -> Result<bool> {
    let read = match value {
        Json::Bool(value) => Some(*value),
        Json::Integer(digits) => match digits.as_str() {
            "0" => Some(false),
            "1" => Some(true),
            _ => None,
        },
        Json::Float(0.0) => Some(false),
        Json::Float(1.0) => Some(true),
        Json::String(text) => match text.to_lowercase().as_str() {
            "0" | "off" | "f" | "false" | "n" | "no" => Some(false),
            "1" | "on" | "t" | "true" | "y" | "yes" => Some(true),
            _ => None,
        },
        _ => None,
    };
    read.ok_or_else(|| malformed(format!("`{key}` must be a boolean, not {}", value.dump())))
}

struct Reader<'a> {
    /// The path of the message, for error messages.
    at: String,
    /// How many bare image parts there were so far.
    supplied: &'a mut usize,
}

impl Reader<'_> {
    fn malformed(&self, reason: impl std::fmt::Display) -> Error {
        malformed(format!("{}: {reason}", self.at))
    }

    fn string(&self, object: &Json, key: &str) -> Result<String> {
        match object.get(key) {
            Some(Json::String(text)) => Ok(text.clone()),
            Some(other) => {
                Err(self.malformed(format!("`{key}` must be a string, not {}", other.type_name())))
            }
            None => Err(self.malformed(format!("`{key}` is missing"))),
        }
    }

    fn optional_string(&self, object: &Json, key: &str) -> Result<Option<String>> {
        match object.get(key) {
            None | Some(Json::Null) => Ok(None),
            Some(_) => self.string(object, key).map(Some),
        }
    }

    fn message(&mut self, message: &Json) -> Result<Message> {
        if !matches!(message, Json::Object(_)) {
            return Err(self.malformed(format!("must be an object, not {}", message.type_name())));
        }
        match message.get("role").and_then(Json::as_str) {
            Some("system" | "developer") => {
                let content = self.required_content(message)?;
                self.only(&content, "system", |part| matches!(part, Part::Text(_) | Part::Thinking { .. }))?;
                Ok(Message::System { content })
            }
            Some("user") => {
                let content = self.required_content(message)?;
                self.only(&content, "user", |part| matches!(part, Part::Text(_) | Part::Image(_)))?;
                Ok(Message::User { content })
            }
            Some("assistant") => self.assistant(message),
            Some("tool") => {
                let content = self.required_content(message)?;
                if message.get("tool_call_id").is_none() {
                    return Err(self.malformed("`tool_call_id` is missing"));
                }
                let tool_call_id = self.optional_string(message, "tool_call_id")?;
                let name = self.optional_string(message, "name")?;
                self.only(&content, "tool", |part| matches!(part, Part::Text(_) | Part::Image(_)))?;
                Ok(Message::Tool { content, tool_call_id, name })
            }
            _ => {
                let role = message.get("role").map_or_else(|| "None".to_owned(), Json::dump);
                Err(self
                    .malformed(format!("unknown message role {role}; use system, user, assistant or tool")))
            }
        }
    }

    fn assistant(&mut self, message: &Json) -> Result<Message> {
        let tool_calls = match message.get("tool_calls") {
            None | Some(Json::Null) => Vec::new(),
            Some(Json::Array(calls)) => {
                calls.iter().map(|call| self.tool_call(call)).collect::<Result<_>>()?
            }
            Some(other) => {
                return Err(self.malformed(format!("tool_calls must be a list, not {}", other.type_name())));
            }
        };
        let mut content = match message.get("content") {
            None | Some(Json::Null) => None,
            Some(value) => Some(self.content(value)?),
        };
        if let Some(thinking) = self.reasoning(message)? {
            let thought = Part::Thinking { thinking, closed: true };
            content = Some(Content::Parts(match content {
                None => vec![thought],
                Some(Content::Text(text)) => vec![thought, Part::Text(text)],
                Some(Content::Parts(parts)) => {
                    if parts.iter().any(|part| matches!(part, Part::Thinking { .. })) {
                        let reason = "Message cannot have both thinking chunks in `content` and a top-level `reasoning` \
                                      or `reasoning_content` field.";
                        return Err(Error::refused(Refusal::AssistantMessage, reason));
                    }
                    std::iter::once(thought).chain(parts).collect()
                }
            }));
        }
        if let Some(content) = &content {
            self.only(content, "assistant", |part| matches!(part, Part::Text(_) | Part::Thinking { .. }))?;
        }
        let prefix = message.get("prefix").map_or(Ok(false), |value| boolean(value, "prefix"))?;
        let weight = match message.get("weight") {
            None | Some(Json::Null) => None,
            Some(Json::Integer(digits)) => digits.parse().ok(),
            Some(Json::Float(weight)) => Some(*weight),
            Some(other) => {
                return Err(self.malformed(format!("`weight` must be a number, not {}", other.type_name())));
            }
        };
        Ok(Message::Assistant { content, tool_calls, prefix, weight })
    }

    /// `reasoning_content` (SGLang) or `reasoning` (vLLM).
    fn reasoning(&self, message: &Json) -> Result<Option<String>> {
        let first = self.optional_string(message, "reasoning_content")?;
        let second = self.optional_string(message, "reasoning")?;
        match (first, second) {
            (Some(first), Some(second)) if first != second => {
                Err(self.malformed("`reasoning_content` and `reasoning` should be equal."))
            }
            (first, second) => Ok(first.or(second)),
        }
    }

    fn required_content(&mut self, message: &Json) -> Result<Content> {
        match message.get("content") {
            None | Some(Json::Null) => Err(self.malformed("`content` is missing")),
            Some(value) => self.content(value),
        }
    }

    fn content(&mut self, value: &Json) -> Result<Content> {
        match value {
            Json::String(text) => Ok(Content::Text(text.clone())),
            Json::Array(parts) => {
                let parts = parts.iter().map(|part| self.part(part)).collect::<Result<_>>()?;
                Ok(Content::Parts(parts))
            }
            other => {
                Err(self
                    .malformed(format!("`content` must be a string or a list, not {}", other.type_name())))
            }
        }
    }

    fn part(&mut self, part: &Json) -> Result<Part> {
        match part.get("type").and_then(Json::as_str) {
            Some("text") => Ok(Part::Text(self.string(part, "text")?)),
            Some("thinking") => Ok(Part::Thinking {
                thinking: self.string(part, "thinking")?,
                closed: part.get("closed").map_or(Ok(true), |value| boolean(value, "closed"))?,
            }),
            Some("image") => self.image(part),
            Some("image_url") => {
                let url = match part.get("image_url") {
                    Some(object @ Json::Object(_)) => self.string(object, "url")?,
                    _ => self.string(part, "image_url")?,
                };
                Ok(Part::Image(ImageSource::Url(url)))
            }
            Some("input_audio" | "audio_url") => {
                Err(self.malformed("audio is not something that Mistral 4 hears"))
            }
            _ => {
                let kind = part.get("type").map_or_else(|| "None".to_owned(), Json::dump);
                Err(self.malformed(format!(
                    "unknown content part type {kind}; use text, image, image_url or thinking"
                )))
            }
        }
    }

    /// `{"type": "image"}` alone takes a supplied image; `path` names a file, `image` holds base64 or a data URL.
    fn image(&mut self, part: &Json) -> Result<Part> {
        let source = if let Some(path) = self.optional_string(part, "path")? {
            ImageSource::Path(path)
        } else if let Some(data) = self.optional_string(part, "image")? {
            let is_url = data.starts_with("data:") || data.starts_with("file:") || data.starts_with("http");
            ImageSource::Url(if is_url { data } else { format!("data:;base64,{data}") })
        } else {
            *self.supplied += 1;
            ImageSource::Supplied(*self.supplied - 1)
        };
        Ok(Part::Image(source))
    }

    /// Refuses a part that a message of this role can never hold.
    fn only(&self, content: &Content, role: &str, allowed: impl Fn(&Part) -> bool) -> Result<()> {
        match content.parts().iter().find(|part| !allowed(part)) {
            Some(part) => {
                Err(self.malformed(format!("{} cannot be used in {role} message.", part.class_name())))
            }
            None => Ok(()),
        }
    }

    fn tool_call(&self, call: &Json) -> Result<ToolCall> {
        check_function_type(call, &self.at)?;
        let id = match call.get("id") {
            None => "null".to_owned(),
            Some(_) => self.string(call, "id")?,
        };
        let Some(function @ Json::Object(_)) = call.get("function") else {
            return Err(self.malformed("a tool call needs a `function` object"));
        };
        let name = self.string(function, "name")?;
        let arguments = match function.get("arguments") {
            Some(object @ Json::Object(_)) => object.dump(),
            Some(Json::Null) => "{}".to_owned(),
            _ => self.string(function, "arguments")?,
        };
        Ok(ToolCall { id, name, arguments })
    }
}

fn check_function_type(object: &Json, at: &str) -> Result<()> {
    match object.get("type") {
        None => Ok(()),
        Some(Json::String(kind)) if kind == "function" => Ok(()),
        Some(other) => Err(malformed(format!("{at}: `type` must be \"function\", not {}", other.dump()))),
    }
}

fn read_tool(index: usize, tool: &Json) -> Result<Tool> {
    let reader = Reader { at: format!("tools[{index}]"), supplied: &mut 0 };
    check_function_type(tool, &reader.at)?;
    let Some(function @ Json::Object(_)) = tool.get("function") else {
        return Err(reader.malformed("a tool needs a `function` object"));
    };
    let name = reader.string(function, "name")?;
    let description = reader.optional_string(function, "description")?.unwrap_or_default();
    let parameters = match function.get("parameters") {
        None | Some(Json::Null) => Json::Object(IndexMap::new()),
        Some(object @ Json::Object(_)) => object.clone(),
        Some(other) => {
            return Err(
                reader.malformed(format!("`parameters` must be an object, not {}", other.type_name()))
            );
        }
    };
    if let Some(strict) = function.get("strict")
        && !strict.is_null()
    {
        boolean(strict, "strict")?;
    }
    Ok(Tool { name, description, parameters })
}

fn read_response_format(value: &Json) -> Result<ResponseFormat> {
    if !matches!(value, Json::Object(_)) {
        return Err(malformed(format!("`response_format` must be an object, not {}", value.type_name())));
    }
    match value.get("type").map(|kind| kind.as_str().unwrap_or_default()) {
        None | Some("text") => Ok(ResponseFormat::Text),
        Some("json_object") => Ok(ResponseFormat::JsonObject),
        Some("json_schema") => match value.get("json_schema").and_then(|named| named.get("schema")) {
            Some(schema @ Json::Object(_)) => match schema::problem(schema) {
                None => Ok(ResponseFormat::JsonSchema(schema.clone())),
                Some(problem) => Err(malformed(format!("`response_format`: {problem}"))),
            },
            _ => Err(malformed("`response_format`: `json_schema.schema` must be an object")),
        },
        Some(_) => Err(malformed("`response_format`: `type` must be text, json_object or json_schema")),
    }
}
