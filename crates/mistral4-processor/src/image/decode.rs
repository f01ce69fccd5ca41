//! Decoding picture files to RGB or RGBA bytes.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};

use crate::{Error, Result};

/// Larger pictures are refused before anything is allocated for them (Pillow refuses at twice 89 million).
const MAX_PIXELS: u64 = 178_956_970;

/// A longer side is refused: its filter weights alone would take gigabytes.
const MAX_SIDE: u32 = 1 << 18;

/// A decoded picture: upright, 8 bits a channel, RGB or RGBA.
///
/// Grey, palette, CMYK and 16-bit pictures are converted, the EXIF orientation is applied. Transparency is kept, because
/// the two processors lay it on white with different rounding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceImage {
    height: usize,
    width: usize,
    channels: usize,
    pixels: Vec<u8>,
}

impl SourceImage {
    /// Decodes PNG, JPEG, WebP, GIF (the first frame) or BMP bytes; `name` appears in error messages.
    ///
    /// # Errors
    /// [`Error::Image`] when the format is unknown, the data is broken, or the picture has more than 179 million pixels.
    pub fn from_bytes(bytes: &[u8], name: &str) -> Result<Self> {
        let failed = |reason: String| Error::Image { name: name.to_owned(), reason };
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let mut reader = reader.map_err(|error| failed(error.to_string()))?;
        if reader.format().is_none() {
            return Err(failed("not a PNG, JPEG, WebP, GIF or BMP file".to_owned()));
        }
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAX_PIXELS * 8);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(|error| failed(error.to_string()))?;
        let (width, height) = decoder.dimensions();
        if width == 0 || height == 0 {
            return Err(failed("the picture has no pixels".to_owned()));
        }
        if u64::from(width) * u64::from(height) > MAX_PIXELS || width.max(height) > MAX_SIDE {
            let reason =
                format!("{width}x{height} is more than {MAX_PIXELS} pixels or than {MAX_SIDE} on a side");
            return Err(failed(reason));
        }
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| failed(error.to_string()))?;
        picture.apply_orientation(orientation);
        Ok(Self::from_dynamic(picture))
    }

    /// Reads and decodes a picture file.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Image`] when it cannot be decoded.
    pub fn from_path(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes, &path.display().to_string())
    }

    /// Converts a picture in memory. Of 16-bit channels the high byte is kept, as Pillow does.
    pub fn from_dynamic(picture: DynamicImage) -> Self {
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        let high =
            |samples: Vec<u16>| samples.into_iter().map(|sample| (sample >> 8) as u8).collect::<Vec<u8>>();
        let (channels, pixels) = match picture {
            DynamicImage::ImageLuma8(_) | DynamicImage::ImageRgb8(_) => (3, picture.into_rgb8().into_raw()),
            DynamicImage::ImageLuma16(_) => {
                let grey = high(picture.into_luma16().into_raw());
                (3, grey.into_iter().flat_map(|value| [value; 3]).collect())
            }
            DynamicImage::ImageRgb16(_) => (3, high(picture.into_rgb16().into_raw())),
            DynamicImage::ImageLumaA16(_) | DynamicImage::ImageRgba16(_) => {
                (4, high(picture.into_rgba16().into_raw()))
            }
            DynamicImage::ImageRgb32F(_) => (3, picture.into_rgb8().into_raw()),
            _ => (4, picture.into_rgba8().into_raw()),
        };
        Self { height, width, channels, pixels }
    }

    /// Takes RGB bytes.
    ///
    /// # Shapes
    /// `pixels` `[height, width, 3]`.
    ///
    /// # Panics
    /// When the number of bytes is not height x width x 3 or a side is 0.
    pub fn from_rgb8(pixels: Vec<u8>, height: usize, width: usize) -> Self {
        assert!(height > 0 && width > 0, "an image has at least one pixel");
        assert_eq!(pixels.len(), height * width * 3, "an RGB image has three bytes a pixel");
        Self { height, width, channels: 3, pixels }
    }

    /// The height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// RGB bytes with transparency laid on white, as Pillow's `alpha_composite` (`composite`) or `paste` rounds.
    ///
    /// # Shapes
    /// Result `[height, width, 3]`.
    pub(super) fn on_white(&self, composite: bool) -> Vec<u8> {
        if self.channels == 3 {
            return self.pixels.clone();
        }
        let mut out = Vec::with_capacity(self.height * self.width * 3);
        for pixel in self.pixels.chunks_exact(4) {
            let alpha = u32::from(pixel[3]);
            out.extend(pixel[..3].iter().map(|value| {
                let value = u32::from(*value);
                if composite {
                    // Weights of 7 fractional bits that sum to 255 x 128.
                    let sum = value * alpha * 128 + 255 * (255 - alpha) * 128 + (0x80 << 7);
                    ((((sum >> 8) + sum) >> 8) >> 7) as u8
                } else {
                    let sum = 255 * (255 - alpha) + value * alpha + 128;
                    (((sum >> 8) + sum) >> 8) as u8
                }
            }));
        }
        out
    }
}
