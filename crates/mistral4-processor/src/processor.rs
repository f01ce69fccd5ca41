//! Tokenizer, chat form and image processor of one model folder.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::chat::{ChatRenderer, ChatRequest, ImageSource, RenderedChat, TokenKind, ValidationMode};
use crate::image::{ImageProcessor, ImageProcessorKind, ProcessedImage, SourceImage, TokenGrid};
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::{Error, Result};

/// Turns conversations with images into what the model takes.
#[derive(Debug)]
pub struct Processor {
    tokenizer: Tokenizer,
    image_processor: Option<ImageProcessor>,
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// What the conversation is for: answering (the default) or training.
    pub mode: ValidationMode,
    /// The folder that image paths are relative to; the current folder when empty.
    pub base_dir: PathBuf,
    /// In training, learn the last assistant turn only.
    pub mask_history: bool,
    /// In training, do not learn thinking.
    pub mask_reasoning_content: bool,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Rendered {
    /// The token ids, the begin token first.
    pub ids: Vec<u32>,
    /// For each id, whether the model learns to write it: assistant turns with their end tokens.
    pub mask: Vec<bool>,
    /// For each id, what it is part of.
    pub kinds: Vec<TokenKind>,
    /// The images in the order of their placeholders.
    pub images: Vec<ProcessedImage>,
    /// The ids as text, control tokens included.
    pub text: String,
}

impl Processor {
    /// Joins a tokenizer and an image processor; without one, images are refused.
    pub fn new(tokenizer: Tokenizer, image_processor: Option<ImageProcessor>) -> Self {
        Self { tokenizer, image_processor }
    }

    /// Reads the tokenizer and the image settings of a model folder.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::from_dir(dir)?;
        let image_processor = ImageProcessor::from_dir(dir, tokenizer.image_config())?;
        Ok(Self { tokenizer, image_processor })
    }

    /// The same processor with another kind of image preparation.
    pub fn with_image_kind(mut self, kind: ImageProcessorKind) -> Self {
        self.image_processor = self.image_processor.map(|processor| processor.with_kind(kind));
        self
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The image processor, if the model sees images.
    pub fn image_processor(&self) -> Option<&ImageProcessor> {
        self.image_processor.as_ref()
    }

    /// Renders a conversation; bare image parts take `supplied` images in order.
    ///
    /// # Errors
    /// [`Error::Refused`] where the chat form refuses the conversation, [`Error::ImageCount`] when the numbers of bare
    /// image parts and supplied images differ, [`Error::Image`] or [`Error::Io`] when an image cannot be prepared.
    pub fn render(
        &self,
        request: &ChatRequest,
        supplied: &[SourceImage],
        options: &RenderOptions,
    ) -> Result<Rendered> {
        let parts = request.supplied_images();
        if parts != supplied.len() {
            return Err(Error::ImageCount { parts, supplied: supplied.len() });
        }
        let mut images = Vec::new();
        let mut placeholders = |source: &ImageSource| -> Result<TokenGrid> {
            let (image, grid) = self.prepare(source, supplied, &options.base_dir)?;
            images.push(image);
            Ok(grid)
        };
        let chat = ChatRenderer::new(&self.tokenizer).render(request, options.mode, &mut placeholders)?;
        let mask = chat.mask(options.mask_history, options.mask_reasoning_content);
        let text = self.tokenizer.decode(&chat.ids, SpecialTokens::Keep)?;
        let RenderedChat { ids, kinds, .. } = chat;
        Ok(Rendered { ids, mask, kinds, images, text })
    }

    fn prepare(
        &self,
        source: &ImageSource,
        supplied: &[SourceImage],
        base_dir: &Path,
    ) -> Result<(ProcessedImage, TokenGrid)> {
        let Some(processor) = &self.image_processor else {
            let reason =
                "the model folder has no image settings (tekken.json, processor_config.json, params.json)";
            return Err(Error::Image { name: describe(source), reason: reason.to_owned() });
        };
        let loaded;
        let image = match source {
            ImageSource::Supplied(index) => &supplied[*index],
            ImageSource::Path(path) => {
                loaded = SourceImage::from_path(&base_dir.join(path))?;
                &loaded
            }
            ImageSource::Url(url) => {
                loaded = from_url(url)?;
                &loaded
            }
        };
        let grid = processor.token_grid(image.height(), image.width());
        Ok((processor.process(image)?, grid))
    }
}

/// A source for an error message, data URLs cut short.
fn describe(source: &ImageSource) -> String {
    match source {
        ImageSource::Supplied(index) => format!("{} of those supplied", index + 1),
        ImageSource::Path(path) => path.clone(),
        ImageSource::Url(url) => url.chars().take(64).collect(),
    }
}

/// Decodes a `data:...;base64,` URL or reads a `file://` URL; nothing is fetched from the network.
fn from_url(url: &str) -> Result<SourceImage> {
    let name: String = url.chars().take(64).collect();
    let failed = |reason: String| Error::Image { name: name.clone(), reason };
    if let Some(path) = url.strip_prefix("file://") {
        return SourceImage::from_path(Path::new(path));
    }
    let payload =
        url.strip_prefix("data:").and_then(|rest| rest.split_once(',')).and_then(|(header, payload)| {
            (header.ends_with(";base64") && !payload.is_empty()).then_some(payload)
        });
    let Some(payload) = payload else {
        let reason =
            "expected `data:<mime>;base64,<payload>` or `file://<path>`; download other images first";
        return Err(failed(reason.to_owned()));
    };
    let bytes =
        STANDARD.decode(payload).map_err(|error| failed(format!("the payload is not base64: {error}")))?;
    SourceImage::from_bytes(&bytes, &name)
}
