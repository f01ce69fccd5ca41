//! Instructions in named columns: a context, a question, an answer.
//!
//! Source: NVIDIA NeMo AutoModel, `datasets/llm/column_mapped_text_instruction_dataset.py` and
//! `format_prompt_completion` of `formatting_utils.py`.

use std::sync::Arc;

use mistral4_processor::chat::{Content, Message, ResponseFormat};
use mistral4_processor::json::Json;
use mistral4_processor::{ChatRequest, Processor, RenderOptions, ValidationMode};

use super::row::{Row, RowForm};
use super::{IGNORE_INDEX, Sample};
use crate::error::Result;
use crate::recipe::InstructionDatasetConfig;

/// Rows of a prompt and an answer, as running text or in the chat form.
pub(crate) struct InstructionForm {
    pub(crate) config: InstructionDatasetConfig,
    pub(crate) processor: Arc<Processor>,
}

impl RowForm for InstructionForm {
    fn sample(&self, row: Row) -> Result<Sample> {
        let context = self.config.context.as_deref().map(|column| text(&row, column)).transpose()?;
        let question = self.config.question.as_deref().map(|column| text(&row, column)).transpose()?;
        let answer = text(&row, &self.config.answer)?;
        let (mut ids, mut learned) = match self.config.use_chat_template {
            true => self.chat(&row, context, question, answer)?,
            false => self.running_text(&row, context, question, answer)?,
        };
        let longest = self.config.seq_length.filter(|_| self.config.truncation).unwrap_or(usize::MAX);
        ids.truncate(longest);
        learned.truncate(longest);
        if !learned.iter().skip(1).any(|&learned| learned) {
            return Err(row.error(&self.config.answer, "nothing of the answer is left to learn"));
        }
        let labels = ids.iter().zip(learned);
        let labels =
            labels.map(|(&id, learned)| if learned { i64::from(id) } else { IGNORE_INDEX }).collect();
        let mut sample = Sample::from_unshifted(ids, labels);
        // Nothing follows the last token, so it is no input.
        sample.input_ids.pop();
        sample.labels.pop();
        Ok(sample)
    }
}

impl InstructionForm {
    /// Context, question and answer joined by spaces, between the begin and the end token.
    fn running_text(
        &self,
        row: &Row,
        context: Option<&str>,
        question: Option<&str>,
        answer: &str,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let tokenizer = self.processor.tokenizer();
        let prompt: String = [context, question].into_iter().flatten().flat_map(|text| [text, " "]).collect();
        if prompt.trim().is_empty() {
            let column = self.config.question.as_ref().or(self.config.context.as_ref());
            return Err(row.error(column.map_or("question", String::as_str), "the prompt is empty"));
        }
        let encode = |text: &str| {
            tokenizer.encode(text).map_err(|error| row.error(&self.config.answer, error.to_string()))
        };
        // As in NeMo, the prompt's own tokens say how many of the whole text's are masked.
        let prompt_tokens = 1 + encode(&prompt)?.len();
        let mut ids = vec![tokenizer.bos()];
        ids.extend(encode(&format!("{prompt}{answer}"))?);
        ids.push(tokenizer.eos());
        let learned =
            (0..ids.len()).map(|t| !self.config.answer_only_loss_mask || t >= prompt_tokens).collect();
        Ok((ids, learned))
    }

    /// A system, a user and an assistant message in the chat form.
    fn chat(
        &self,
        row: &Row,
        context: Option<&str>,
        question: Option<&str>,
        answer: &str,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let content = |text: Option<&str>| Content::Text(text.unwrap_or_default().to_owned());
        let mut messages = Vec::new();
        if context.is_some() {
            messages.push(Message::System { content: content(context) });
        }
        messages.push(Message::User { content: content(question) });
        let content = Some(content(Some(answer)));
        messages.push(Message::Assistant { content, tool_calls: Vec::new(), prefix: false, weight: None });
        let request = ChatRequest {
            messages,
            tools: Vec::new(),
            reasoning_effort: None,
            response_format: ResponseFormat::Text,
        };
        let options = RenderOptions { mode: ValidationMode::Finetuning, ..RenderOptions::default() };
        let rendered = self.processor.render(&request, &[], &options);
        let rendered = rendered.map_err(|error| row.error(&self.config.answer, error.to_string()))?;
        let mask = match self.config.answer_only_loss_mask {
            true => rendered.mask,
            false => vec![true; rendered.ids.len()],
        };
        Ok((rendered.ids, mask))
    }
}

fn text<'r>(row: &'r Row, column: &str) -> Result<&'r str> {
    match row.value.get(column) {
        Some(Json::String(text)) => Ok(text),
        Some(other) => Err(row.error(column, format!("must be text, not {}", other.type_name()))),
        None => {
            let Json::Object(columns) = &row.value else { unreachable!("rows are objects") };
            let names: Vec<&str> = columns.keys().map(String::as_str).collect();
            Err(row.error(column, format!("is missing; the row has {}", names.join(", "))))
        }
    }
}
