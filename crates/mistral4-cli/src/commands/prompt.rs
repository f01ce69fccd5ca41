//! From texts, conversations and image files to token ids and pixel values.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use mistral4::Images;
use mistral4_processor::chat::{Content, ImageSource, Message, Part, ResponseFormat};
use mistral4_processor::{
    ChatRequest, ImageBatch, ProcessedImage, Processor, ReasoningEffort, RenderOptions, Rendered, SourceImage,
};

use crate::error::{Error, Result};

/// Reads a text file.
pub(super) fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::unreadable(path, &source))
}

/// Decodes image files.
pub(super) fn read_images(paths: &[PathBuf]) -> Result<Vec<SourceImage>> {
    paths.iter().map(|path| Ok(SourceImage::from_path(path)?)).collect()
}

/// Renders the conversation of a file; image paths in it are relative to the file.
pub(super) fn render_file(processor: &Processor, path: &Path, images: &[SourceImage]) -> Result<Rendered> {
    let in_file = |error: mistral4_processor::Error| Error::from(error).context(path.display().to_string());
    let request = ChatRequest::from_json(&read_text(path)?).map_err(in_file)?;
    let base_dir = path.parent().map(Path::to_path_buf).unwrap_or_default();
    let options = RenderOptions { base_dir, ..Default::default() };
    processor.render(&request, images, &options).map_err(in_file)
}

/// What the user says, images first; they are numbered from `first_image` among those supplied.
pub(super) fn user_message(text: &str, images: usize, first_image: usize) -> Message {
    if images == 0 {
        return Message::User { content: Content::Text(text.to_owned()) };
    }
    let images = (first_image..first_image + images).map(|i| Part::Image(ImageSource::Supplied(i)));
    let text = (!text.is_empty()).then(|| Part::Text(text.to_owned()));
    Message::User { content: Content::Parts(images.chain(text).collect()) }
}

/// Instructions for the model.
pub(super) fn system_message(text: &str) -> Message {
    Message::System { content: Content::Text(text.to_owned()) }
}

/// A conversation without tools.
pub(super) fn request(messages: Vec<Message>, reasoning_effort: Option<ReasoningEffort>) -> ChatRequest {
    ChatRequest { messages, tools: Vec::new(), reasoning_effort, response_format: ResponseFormat::Text }
}

pub(super) fn parse_effort(text: &str) -> Result<ReasoningEffort, String> {
    ReasoningEffort::parse(text).ok_or_else(|| {
        "use none, minimal, low, medium, high, xhigh or max; models offer some of them".to_owned()
    })
}

/// Pads prepared images to one size; `None` when there are none.
pub(super) fn batch(processor: &Processor, images: &[ProcessedImage]) -> Option<ImageBatch> {
    let image_processor = processor.image_processor().filter(|_| !images.is_empty())?;
    Some(image_processor.batch(images))
}

/// Prepared images on a device.
pub(super) fn to_device(batch: ImageBatch, device: &Device) -> Images {
    let shape = [batch.image_sizes.len(), 3, batch.height, batch.width];
    Images {
        pixel_values: Tensor::from_data(TensorData::new(batch.pixel_values, shape), device),
        image_sizes: batch.image_sizes.into_iter().map(|[height, width]| (height, width)).collect(),
    }
}
