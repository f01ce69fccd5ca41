//! The image processor: size, resize, rescale, normalise, pad.

use std::path::Path;

use super::{ImageProcessorConfig, ImageProcessorKind, SourceImage, TokenGrid, cubic, resample};
use crate::tokenizer::ImageConfig;
use crate::{Error, Result};

/// Prepares pictures for the Pixtral tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    config: ImageProcessorConfig,
}

/// One prepared image.
///
/// # Shapes
/// `pixels` `[3, height, width]`, both sides multiples of an image token's side.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessedImage {
    /// The values, red, green and blue plane after plane.
    pub pixels: Vec<f32>,
    /// The height in pixels.
    pub height: usize,
    /// The width in pixels.
    pub width: usize,
}

/// Several prepared images, padded with zeros at the bottom and at the right to one size.
///
/// # Shapes
/// `pixel_values` `[images, 3, height, width]`, `image_sizes` `[images, 2]` (height, width).
#[derive(Debug, Clone, PartialEq)]
pub struct ImageBatch {
    /// The padded values.
    pub pixel_values: Vec<f32>,
    /// The common height in pixels.
    pub height: usize,
    /// The common width in pixels.
    pub width: usize,
    /// Each image's own height and width in pixels.
    pub image_sizes: Vec<[usize; 2]>,
}

impl ImageProcessor {
    /// An image processor with these numbers.
    ///
    /// # Panics
    /// When a side, the patch size or the merge size is 0.
    pub fn new(config: ImageProcessorConfig) -> Self {
        let sizes = [config.patch_size, config.spatial_merge_size, config.max_height, config.max_width];
        assert!(sizes.iter().all(|size| *size > 0), "sizes of an image processor are above 0");
        Self { config }
    }

    /// The image processor of a model folder, if it has one; see [`ImageProcessorConfig::from_dir`].
    ///
    /// # Errors
    /// When a file cannot be read or one of its values is out of range.
    pub fn from_dir(dir: &Path, tokenizer_image: Option<ImageConfig>) -> Result<Option<Self>> {
        Ok(ImageProcessorConfig::from_dir(dir, tokenizer_image)?.map(Self::new))
    }

    /// The same image processor with another kind's sizes and pixels.
    pub fn with_kind(mut self, kind: ImageProcessorKind) -> Self {
        self.config.kind = kind;
        self
    }

    /// The numbers of this image processor.
    pub fn config(&self) -> &ImageProcessorConfig {
        &self.config
    }

    /// The side of an image token in pixels.
    pub fn token_size(&self) -> usize {
        self.config.patch_size * self.config.spatial_merge_size
    }

    /// How many image tokens a picture of this size in pixels takes, at least one each way.
    pub fn token_grid(&self, height: usize, width: usize) -> TokenGrid {
        let (rows, columns) = self.fitted(height, width);
        let tokens = |side: usize| side.div_ceil(self.token_size()).max(1);
        TokenGrid { rows: tokens(rows), columns: tokens(columns) }
    }

    /// The sides after the picture is brought within the maximum; a side never vanishes.
    fn fitted(&self, height: usize, width: usize) -> (usize, usize) {
        let config = &self.config;
        let ratio = (height as f64 / config.max_height as f64).max(width as f64 / config.max_width as f64);
        if !config.do_resize || ratio <= 1.0 {
            return (height, width);
        }
        let scale = |side: usize| {
            let side = side as f64 / ratio;
            let side = match config.kind {
                ImageProcessorKind::HuggingFace => side.floor(),
                ImageProcessorKind::MistralCommon => side.round_ties_even(),
            };
            (side as usize).max(1)
        };
        (scale(height), scale(width))
    }

    /// Decodes and prepares the bytes of a picture file; `name` appears in error messages.
    ///
    /// # Errors
    /// When the picture cannot be decoded, or, without resizing, does not consist of whole image tokens.
    pub fn process_bytes(&self, bytes: &[u8], name: &str) -> Result<ProcessedImage> {
        self.process(&SourceImage::from_bytes(bytes, name)?)
    }

    /// Reads, decodes and prepares a picture file.
    ///
    /// # Errors
    /// When the file cannot be read or decoded, or, without resizing, does not consist of whole image tokens.
    pub fn process_path(&self, path: &Path) -> Result<ProcessedImage> {
        self.process(&SourceImage::from_path(path)?)
    }

    /// Prepares a picture.
    ///
    /// # Errors
    /// Without resizing (`do_resize` false), when the picture does not consist of whole image tokens.
    pub fn process(&self, image: &SourceImage) -> Result<ProcessedImage> {
        let size = (image.height(), image.width());
        let side = self.token_size();
        let whole = size.0.is_multiple_of(side) && size.1.is_multiple_of(side);
        if !self.config.do_resize && !whole {
            let reason = format!(
                "{}x{} pixels are not whole image tokens of {side}, and do_resize is off",
                size.1, size.0
            );
            return Err(Error::Image { name: "without resizing".to_owned(), reason });
        }
        let grid = self.token_grid(size.0, size.1);
        let new_size = (grid.rows * side, grid.columns * side);
        let pixels = match self.config.kind {
            ImageProcessorKind::HuggingFace => {
                let bytes = resample::resize(&image.on_white(true), size, new_size, self.config.resample);
                self.values(bytes.into_iter(), new_size, |byte| f64::from(byte) * self.config.rescale_factor)
            }
            ImageProcessorKind::MistralCommon => {
                let values = cubic::resize(&image.on_white(false), size, new_size);
                self.values(values.into_iter(), new_size, |value| f64::from(value / 255.0))
            }
        };
        Ok(ProcessedImage { pixels, height: new_size.0, width: new_size.1 })
    }

    /// Rescales, normalises and sorts interleaved values into planes. Each step is rounded to f32, as NumPy does.
    fn values<T: Into<f64> + Copy>(
        &self,
        values: impl Iterator<Item = T>,
        size: (usize, usize),
        rescale: impl Fn(T) -> f64,
    ) -> Vec<f32> {
        let config = &self.config;
        let plane = size.0 * size.1;
        let (mean, std) = (config.image_mean.map(|mean| mean as f32), config.image_std.map(|std| std as f32));
        let mut pixels = vec![0.0; 3 * plane];
        for (place, value) in values.enumerate() {
            let channel = place % 3;
            let value = if config.do_rescale { rescale(value) as f32 } else { value.into() as f32 };
            let value = if config.do_normalize { (value - mean[channel]) / std[channel] } else { value };
            pixels[channel * plane + place / 3] = value;
        }
        pixels
    }

    /// Pads prepared images to one size.
    pub fn batch(&self, images: &[ProcessedImage]) -> ImageBatch {
        let height = images.iter().map(|image| image.height).max().unwrap_or(0);
        let width = images.iter().map(|image| image.width).max().unwrap_or(0);
        let mut pixel_values = vec![0.0; images.len() * 3 * height * width];
        for (index, image) in images.iter().enumerate() {
            for (row, values) in image.pixels.chunks_exact(image.width).enumerate() {
                let (channel, y) = (row / image.height, row % image.height);
                let start = ((index * 3 + channel) * height + y) * width;
                pixel_values[start..start + image.width].copy_from_slice(values);
            }
        }
        let image_sizes = images.iter().map(|image| [image.height, image.width]).collect();
        ImageBatch { pixel_values, height, width, image_sizes }
    }
}
