//! Where the image processor's numbers come from.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::tokenizer::ImageConfig;
use crate::{Error, Result};

/// Whose pixels to reproduce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageProcessorKind {
    /// transformers' Pixtral processor: sides rounded down, Pillow's antialiased resizing.
    #[default]
    HuggingFace,
    /// `mistral_common`: sides rounded to nearest, OpenCV's cubic resizing.
    MistralCommon,
}

/// A filter of Pillow's resizing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resample {
    /// Code 2.
    Bilinear,
    /// Code 3.
    #[default]
    Bicubic,
    /// Code 1.
    Lanczos,
}

/// The numbers of an image processor.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessorConfig {
    /// Whose pixels to reproduce.
    pub kind: ImageProcessorKind,
    /// The side of a vision patch in pixels.
    pub patch_size: usize,
    /// How many patches along each side join into one image token.
    pub spatial_merge_size: usize,
    /// The most pixels a prepared image may have from top to bottom.
    pub max_height: usize,
    /// The most pixels a prepared image may have from left to right.
    pub max_width: usize,
    /// Whether images are resized; if not, they have to come in whole image tokens.
    pub do_resize: bool,
    /// The filter (Hugging Face only).
    pub resample: Resample,
    /// Whether bytes are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// Usually 1/255.
    pub rescale_factor: f64,
    /// Whether `image_mean` is subtracted and the rest divided by `image_std`.
    pub do_normalize: bool,
    /// The mean of red, green and blue.
    pub image_mean: [f64; 3],
    /// The standard deviation of red, green and blue.
    pub image_std: [f64; 3],
}

impl Default for ImageProcessorConfig {
    /// The numbers of Mistral Small 4: patches of 14, 2 x 2 merged, up to 1540 pixels, CLIP's mean and deviation.
    fn default() -> Self {
        Self {
            kind: ImageProcessorKind::HuggingFace,
            patch_size: 14,
            spatial_merge_size: 2,
            max_height: 1540,
            max_width: 1540,
            do_resize: true,
            resample: Resample::Bicubic,
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.48145466, 0.4578275, 0.40821073],
            image_std: [0.26862954, 0.26130258, 0.27577711],
        }
    }
}

impl From<ImageConfig> for ImageProcessorConfig {
    fn from(image: ImageConfig) -> Self {
        Self {
            patch_size: image.image_patch_size,
            spatial_merge_size: image.spatial_merge_size,
            max_height: image.max_image_size,
            max_width: image.max_image_size,
            ..Self::default()
        }
    }
}

impl ImageProcessorConfig {
    /// Reads the image settings of a model folder, later sources over earlier ones: `vision_encoder` of `params.json`,
    /// `tokenizer_image` (of `tekken.json`), `preprocessor_config.json` or else `image_processor` in
    /// `processor_config.json`; patch and merge size then come from `config.json` and `processor_config.json`, whose
    /// values transformers takes. A folder with none of these has no image processor.
    ///
    /// # Errors
    /// When a file cannot be read or one of its values is out of range.
    pub fn from_dir(dir: &Path, tokenizer_image: Option<ImageConfig>) -> Result<Option<Self>> {
        let params = Section::read(dir, "params.json")?.and_then(|section| section.child("vision_encoder"));
        let processor = Section::read(dir, "processor_config.json")?;
        let preprocessor = Section::read(dir, "preprocessor_config.json")?;
        let pixels =
            preprocessor.or_else(|| processor.as_ref().and_then(|section| section.child("image_processor")));
        let model = Section::read(dir, "config.json")?;
        let vision = model.as_ref().and_then(|section| section.child("vision_config"));
        let mut config = match tokenizer_image {
            Some(image) => Self::from(image),
            // Alone, the patch size of an image processor is that of an image token.
            None if pixels.is_some() => Self { spatial_merge_size: 1, ..Self::default() },
            None if params.is_some() || vision.is_some() => Self::default(),
            None => return Ok(None),
        };
        if let (Some(section), None) = (&params, tokenizer_image) {
            section.count("patch_size", &mut config.patch_size)?;
            section.count("image_size", &mut config.max_height)?;
            section.count("max_image_size", &mut config.max_height)?;
            config.max_width = config.max_height;
            section.count("spatial_merge_size", &mut config.spatial_merge_size)?;
        }
        if let Some(section) = &pixels {
            section.pixels(&mut config)?;
        }
        if let (Some(model), Some(vision)) = (&model, &vision) {
            model.count("spatial_merge_size", &mut config.spatial_merge_size)?;
            vision.count("patch_size", &mut config.patch_size)?;
            if pixels.is_none() && params.is_none() && tokenizer_image.is_none() {
                vision.count("image_size", &mut config.max_height)?;
                config.max_width = config.max_height;
            }
        }
        if let Some(section) = &processor {
            section.count("patch_size", &mut config.patch_size)?;
            section.count("spatial_merge_size", &mut config.spatial_merge_size)?;
        }
        Ok(Some(config))
    }
}

/// No side is longer; a larger number in a file is a mistake, not a reason to allocate.
const MAX_SIDE: u64 = 1 << 16;

/// An object of a JSON file, with its place for error messages.
struct Section {
    path: PathBuf,
    prefix: String,
    value: Value,
}

impl Section {
    /// The file's object, if the file is there.
    fn read(dir: &Path, name: &str) -> Result<Option<Self>> {
        let path = dir.join(name);
        if !path.is_file() {
            return Ok(None);
        }
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Some(Self { path, prefix: String::new(), value })),
            Err(error) => Err(Error::Malformed { path, key: ".".to_owned(), reason: error.to_string() }),
        }
    }

    /// The object under a key, if it is there.
    fn child(&self, key: &str) -> Option<Self> {
        let value = self.value.get(key).filter(|value| value.is_object())?;
        Some(Self { path: self.path.clone(), prefix: format!("{}{key}.", self.prefix), value: value.clone() })
    }

    fn malformed(&self, key: &str, expected: &str) -> Error {
        let reason = format!("expected {expected}, found {}", self.value[key]);
        Error::Malformed { path: self.path.clone(), key: format!("{}{key}", self.prefix), reason }
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// A side in pixels or a number of patches; a `{height, width}` object has to be square.
    fn count(&self, key: &str, target: &mut usize) -> Result<()> {
        let Some(value) = self.present(key) else { return Ok(()) };
        let square = value.get("height").filter(|height| Some(*height) == value.get("width"));
        match square.unwrap_or(value).as_u64() {
            Some(number) if (1..=MAX_SIDE).contains(&number) => {
                *target = number as usize;
                Ok(())
            }
            _ => Err(self.malformed(key, "a whole number from 1 to 65536, or two equal ones")),
        }
    }

    fn flag(&self, key: &str, target: &mut bool) -> Result<()> {
        match self.present(key) {
            None => Ok(()),
            Some(Value::Bool(value)) => {
                *target = *value;
                Ok(())
            }
            Some(_) => Err(self.malformed(key, "true or false")),
        }
    }

    /// One number for all channels or three.
    fn channels(&self, key: &str, target: &mut [f64; 3]) -> Result<()> {
        let Some(value) = self.present(key) else { return Ok(()) };
        let expected = "a number or three numbers";
        match value {
            Value::Array(list) if list.len() == 3 => {
                for (slot, number) in target.iter_mut().zip(list) {
                    *slot = number.as_f64().ok_or_else(|| self.malformed(key, expected))?;
                }
                Ok(())
            }
            number => {
                *target = [number.as_f64().ok_or_else(|| self.malformed(key, expected))?; 3];
                Ok(())
            }
        }
    }

    /// Everything that an image processor's own section may say.
    fn pixels(&self, config: &mut ImageProcessorConfig) -> Result<()> {
        self.count("patch_size", &mut config.patch_size)?;
        self.size(config)?;
        self.flag("do_resize", &mut config.do_resize)?;
        self.flag("do_rescale", &mut config.do_rescale)?;
        self.flag("do_normalize", &mut config.do_normalize)?;
        self.channels("image_mean", &mut config.image_mean)?;
        self.channels("image_std", &mut config.image_std)?;
        if config.image_std.contains(&0.0) {
            return Err(self.malformed("image_std", "numbers other than 0"));
        }
        if let Some(value) = self.present("rescale_factor") {
            let expected = "a number other than 0";
            let factor = value.as_f64().filter(|factor| *factor != 0.0);
            config.rescale_factor = factor.ok_or_else(|| self.malformed("rescale_factor", expected))?;
        }
        if let Some(value) = self.present("resample") {
            config.resample = match value.as_u64() {
                Some(1) => Resample::Lanczos,
                Some(2) => Resample::Bilinear,
                Some(3) => Resample::Bicubic,
                _ => return Err(self.malformed("resample", "1 (Lanczos), 2 (bilinear) or 3 (bicubic)")),
            };
        }
        let mut crops = false;
        self.flag("do_center_crop", &mut crops)?;
        if crops {
            Err(self.malformed("do_center_crop", "false; Pixtral images are not cropped"))
        } else {
            Ok(())
        }
    }

    /// `{"longest_edge": n}`, `{"height": h, "width": w}` or `n`.
    fn size(&self, config: &mut ImageProcessorConfig) -> Result<()> {
        let Some(size) = self.present("size") else { return Ok(()) };
        if !size.is_object() {
            self.count("size", &mut config.max_height)?;
            config.max_width = config.max_height;
            return Ok(());
        }
        let Some(section) = self.child("size") else { return Ok(()) };
        if section.present("longest_edge").is_some() {
            section.count("longest_edge", &mut config.max_height)?;
            config.max_width = config.max_height;
            return Ok(());
        }
        if section.present("height").is_none() || section.present("width").is_none() {
            return Err(self.malformed("size", "`longest_edge`, or `height` and `width`"));
        }
        section.count("height", &mut config.max_height)?;
        section.count("width", &mut config.max_width)
    }
}
