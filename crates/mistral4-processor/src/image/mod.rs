//! Pictures to pixel values.

mod config;
mod cubic;
mod decode;
mod process;
mod resample;

pub use config::{ImageProcessorConfig, ImageProcessorKind, Resample};
pub use decode::SourceImage;
pub use process::{ImageBatch, ImageProcessor, ProcessedImage};

/// How many image tokens an image takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenGrid {
    /// Image tokens from top to bottom.
    pub rows: usize,
    /// Image tokens from left to right.
    pub columns: usize,
}

impl TokenGrid {
    /// The number of `[IMG]` tokens.
    pub fn tokens(&self) -> usize {
        self.rows * self.columns
    }
}
