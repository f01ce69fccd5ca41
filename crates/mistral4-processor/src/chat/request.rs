//! The parts of a chat request.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::json::Json;

/// A conversation to answer or to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The messages, oldest first.
    pub messages: Vec<Message>,
    /// The tools the model may call.
    pub tools: Vec<Tool>,
    /// How much the model thinks before it answers; the model's default when absent.
    pub reasoning_effort: Option<ReasoningEffort>,
    /// The form of the answer; only models whose tokenizer file says so render it.
    pub response_format: ResponseFormat,
}

/// A message by its role.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Instructions for the model.
    System {
        /// Text, or parts that are text or thinking.
        content: Content,
    },
    /// What the user says.
    User {
        /// Text, or parts that are text or images.
        content: Content,
    },
    /// What the model says.
    Assistant {
        /// Text, or parts that are text or thinking.
        content: Option<Content>,
        /// Calls of tools.
        tool_calls: Vec<ToolCall>,
        /// Whether the model continues this message, which then has no end token.
        prefix: bool,
        /// The weight in training, 0 or 1; 1 when absent.
        weight: Option<f64>,
    },
    /// What a tool returned.
    Tool {
        /// Text, or parts that are text or images.
        content: Content,
        /// The call that this answers.
        tool_call_id: Option<String>,
        /// The tool's name.
        name: Option<String>,
    },
}

impl Message {
    /// The role as requests write it.
    pub fn role(&self) -> &'static str {
        match self {
            Self::System { .. } => "system",
            Self::User { .. } => "user",
            Self::Assistant { .. } => "assistant",
            Self::Tool { .. } => "tool",
        }
    }

    /// The content, if there is any.
    pub fn content(&self) -> Option<&Content> {
        match self {
            Self::Assistant { content, .. } => content.as_ref(),
            Self::System { content } | Self::User { content } | Self::Tool { content, .. } => Some(content),
        }
    }
}

/// What a message holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// One text.
    Text(String),
    /// Several parts.
    Parts(Vec<Part>),
}

impl Content {
    /// Whether there is nothing at all in it. A list of empty texts is not empty.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Parts(parts) => parts.is_empty(),
        }
    }

    /// The parts; none for plain text.
    pub fn parts(&self) -> &[Part] {
        match self {
            Self::Text(_) => &[],
            Self::Parts(parts) => parts,
        }
    }
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// A text.
    Text(String),
    /// An image.
    Image(ImageSource),
    /// Thinking before an answer.
    Thinking {
        /// The thoughts.
        thinking: String,
        /// Whether the thinking has ended.
        closed: bool,
    },
}

impl Part {
    /// The name of `mistral_common`'s class for this part, as its error messages write it.
    pub(super) fn class_name(&self) -> &'static str {
        match self {
            Self::Text(_) => "TextChunk",
            Self::Image(ImageSource::Url(_)) => "ImageURLChunk",
            Self::Image(_) => "ImageChunk",
            Self::Thinking { .. } => "ThinkChunk",
        }
    }
}

/// Where an image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// The image with this index among those supplied beside the messages.
    Supplied(usize),
    /// A file, relative to the folder of the request.
    Path(String),
    /// A `data:` URL with base64, or a `file://` URL.
    Url(String),
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does, in words.
    pub description: String,
    /// The JSON schema (draft 7) of its arguments, an object.
    pub parameters: Json,
}

/// A call of a function.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// The call's id; `null`, written out, when the request names none.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments as JSON text.
    pub arguments: String,
}

/// How much the model thinks before it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReasoningEffort {
    /// No thinking.
    None,
    /// As little as possible.
    Minimal,
    /// A little.
    Low,
    /// Some.
    Medium,
    /// Much.
    High,
    /// Very much.
    Xhigh,
    /// As much as the model can.
    Max,
}

impl ReasoningEffort {
    const ALL: [Self; 7] =
        [Self::None, Self::Minimal, Self::Low, Self::Medium, Self::High, Self::Xhigh, Self::Max];

    /// The effort with this name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|effort| effort.as_str() == text)
    }

    /// The name as requests write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Xhigh => "xhigh",
            Self::Max => "max",
        }
    }
}

impl fmt::Display for ReasoningEffort {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The form of the answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ResponseFormat {
    /// Any text.
    #[default]
    Text,
    /// A JSON object or list.
    JsonObject,
    /// JSON that this draft 7 schema describes.
    JsonSchema(Json),
}

/// What a conversation is for, which decides what may end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ValidationMode {
    /// To be answered; `mistral_common` calls its default mode `test`.
    #[default]
    Test,
    /// To be answered, every tool call with its result.
    Serving,
    /// To be learned from: the last message is the assistant's.
    Finetuning,
    /// Either: no rule about the last message.
    Agnostic,
}

/// Which rule a refused conversation broke; the names follow `mistral_common`'s exceptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The request is not of the right shape: a missing key, a wrong type, an unknown role or part.
    Malformed,
    /// Roles in a wrong order, or results that do not answer calls.
    MessageStructure,
    /// A user message's content.
    UserMessage,
    /// An assistant message's content.
    AssistantMessage,
    /// A tool message's content, name or id.
    ToolMessage,
    /// A system message's content.
    SystemPrompt,
    /// A tool's name.
    Tool,
    /// A tool's parameters are not a JSON schema.
    ToolSchema,
    /// A call's function name or id.
    FunctionCall,
    /// A setting that the model does not have, or anything else in the request.
    Request,
    /// The version's chat form cannot express the message.
    ChatForm,
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(match self {
            Self::Malformed => "malformed request",
            Self::MessageStructure => "invalid message structure",
            Self::UserMessage => "invalid user message",
            Self::AssistantMessage => "invalid assistant message",
            Self::ToolMessage => "invalid tool message",
            Self::SystemPrompt => "invalid system prompt",
            Self::Tool => "invalid tool",
            Self::ToolSchema => "invalid tool schema",
            Self::FunctionCall => "invalid function call",
            Self::Request => "invalid request",
            Self::ChatForm => "not expressible in the chat form",
        })
    }
}
