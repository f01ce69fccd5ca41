//! The inputs of a pass: read, and checked against each other and against the model.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use mistral4::inputs::Layout;
use mistral4::{Images, ModelInputs};
use mistral4_checkpoint::config::Config;

use crate::error::Result;
use crate::tensors::{Array, TensorFile};

const NAMES: &[&str] =
    &["input_ids", "attention_mask", "position_ids", "labels", "pixel_values", "image_sizes", "cu_seqlens"];

/// Marks tokens without a label.
const IGNORE: i64 = -100;

/// What a file asks the model to do.
pub(super) struct Inputs {
    /// `[T]`
    pub(super) input_ids: Vec<u32>,
    pub(super) layout: Layout,
    /// `[T]`, false for padding.
    pub(super) attention_mask: Option<Vec<bool>>,
    /// `[T]`
    pub(super) position_ids: Option<Vec<i64>>,
    /// `[T]`, as in the file: each token's own label.
    pub(super) labels: Option<Vec<i64>>,
    images: Option<Pixels>,
}

struct Pixels {
    /// `[images, channels, H, W]`
    pixel_values: Array<f32>,
    /// Height and width of each image.
    image_sizes: Vec<(usize, usize)>,
}

impl Inputs {
    /// Reads a file for a model.
    ///
    /// # Errors
    /// A tensor that is missing, unknown, or of another format, shape or range: file and tensor are named.
    pub(super) fn read(path: &Path, config: &Config) -> Result<Self> {
        let file = TensorFile::read(path, NAMES)?;
        let ids = file.i64("input_ids")?.ok_or_else(|| file.missing("input_ids", "the tokens"))?;
        let vocab = config.text.vocab_size as i64;
        in_range(
            &file,
            "input_ids",
            &ids,
            |id| (0..vocab).contains(&id),
            &format!("0..{vocab}, the vocabulary"),
        )?;
        let layout = layout(&file, &ids)?;
        let like_ids = |name: &str| -> Result<Option<Array<i64>>> {
            let array = file.i64(name)?;
            match &array {
                Some(array) if array.shape != ids.shape => Err(file.error(
                    name,
                    &format!("has shape {:?}, but `input_ids` has {:?}", array.shape, ids.shape),
                )),
                _ => Ok(array),
            }
        };
        let mask = like_ids("attention_mask")?;
        if let Some(mask) = &mask {
            if matches!(layout, Layout::Packed { .. }) {
                return Err(
                    file.error("attention_mask", "does not go with packed tokens; cu_seqlens says it")
                );
            }
            in_range(&file, "attention_mask", mask, |m| m == 0 || m == 1, "0 (padding) and 1")?;
        }
        let positions = like_ids("position_ids")?;
        if let Some(positions) = &positions {
            in_range(&file, "position_ids", positions, |p| p >= 0, "0 and above")?;
        }
        let labels = like_ids("labels")?;
        if let Some(labels) = &labels {
            let allowed = format!("{IGNORE} (ignored) and 0..{vocab}");
            in_range(&file, "labels", labels, |l| l == IGNORE || (0..vocab).contains(&l), &allowed)?;
        }
        Ok(Inputs {
            input_ids: ids.values.iter().map(|&id| id as u32).collect(),
            layout,
            attention_mask: mask.map(|mask| mask.values.iter().map(|&m| m == 1).collect()),
            position_ids: positions.map(|positions| positions.values),
            labels: labels.map(|labels| labels.values),
            images: pixels(&file, config)?,
        })
    }

    /// What the model takes.
    pub(super) fn model_inputs(&self, device: &Device) -> ModelInputs {
        let ids = self.input_ids.clone();
        let mut inputs = match &self.layout {
            Layout::Rows { batch, .. } => ModelInputs::rows(ids, *batch),
            Layout::Packed { cu_seqlens } => ModelInputs::packed(ids, cu_seqlens.clone()),
        };
        inputs.attention_mask = self.attention_mask.clone();
        inputs.position_ids = self.position_ids.clone();
        inputs.images = self.images(device);
        inputs
    }

    /// The images on a device.
    pub(super) fn images(&self, device: &Device) -> Option<Images> {
        let Pixels { pixel_values: Array { shape, values }, image_sizes } = self.images.as_ref()?;
        let data = TensorData::new(values.clone(), shape.clone());
        Some(Images { pixel_values: Tensor::from_data(data, device), image_sizes: image_sizes.clone() })
    }

    /// The target of each token: the label of the next one in its row or sequence.
    ///
    /// # Shapes
    /// - `labels`, output: `[T]`
    pub(super) fn targets(&self, labels: &[i64]) -> Vec<i64> {
        let mut targets: Vec<i64> = labels.iter().skip(1).copied().chain([IGNORE]).collect();
        let ends: Vec<usize> = match &self.layout {
            Layout::Rows { batch, sequence } => (1..=*batch).map(|row| row * sequence).collect(),
            Layout::Packed { cu_seqlens } => cu_seqlens.clone(),
        };
        ends.into_iter().filter(|&end| end > 0).for_each(|end| targets[end - 1] = IGNORE);
        targets
    }
}

fn layout(file: &TensorFile, ids: &Array<i64>) -> Result<Layout> {
    if ids.values.is_empty() {
        return Err(file.error("input_ids", &format!("is empty: its shape is {:?}", ids.shape)));
    }
    let offsets = file.i64("cu_seqlens")?;
    match (ids.shape.as_slice(), offsets) {
        (&[batch, sequence], None) => Ok(Layout::Rows { batch, sequence }),
        (&[tokens], Some(offsets)) => {
            let rising = offsets.values.windows(2).all(|pair| pair[0] <= pair[1]);
            let ends = (offsets.values.first(), offsets.values.last());
            if offsets.shape.len() != 1 || !rising || ends != (Some(&0), Some(&(tokens as i64))) {
                let problem = format!("must rise from 0 to {tokens}, the number of tokens");
                return Err(file.error("cu_seqlens", &problem));
            }
            Ok(Layout::Packed { cu_seqlens: offsets.values.iter().map(|&offset| offset as usize).collect() })
        }
        (&[_, _], Some(_)) => {
            Err(file.error("cu_seqlens", "goes with packed `input_ids` [T], not with rows"))
        }
        (&[_], None) => Err(file.missing("cu_seqlens", "which `input_ids` [T] needs")),
        (shape, _) => {
            Err(file.error("input_ids", &format!("has shape {shape:?}, expected [B, S], or [T] when packed")))
        }
    }
}

fn in_range(
    file: &TensorFile,
    name: &str,
    array: &Array<i64>,
    allowed: impl Fn(i64) -> bool,
    description: &str,
) -> Result<()> {
    match array.values.iter().position(|&value| !allowed(value)) {
        None => Ok(()),
        Some(place) => {
            let mut rest = place;
            let mut index: Vec<usize> = Vec::new();
            for &size in array.shape.iter().rev() {
                index.insert(0, rest % size);
                rest /= size;
            }
            let value = array.values[place];
            Err(file.error(name, &format!("is {value} at {index:?}, allowed is {description}")))
        }
    }
}

fn pixels(file: &TensorFile, config: &Config) -> Result<Option<Pixels>> {
    let (pixel_values, sizes) = match (file.f32("pixel_values")?, file.i64("image_sizes")?) {
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(file.missing("image_sizes", "the height and width of each image")),
        (None, Some(_)) => return Err(file.missing("pixel_values", "the pixels of the images")),
        (Some(pixels), Some(sizes)) => (pixels, sizes),
    };
    let Some(vision) = &config.vision else {
        return Err(file
            .error("pixel_values", "is given, but the model is a text model")
            .with_hint("use a multimodal checkpoint, or leave the images out"));
    };
    let channels = vision.vision_config.num_channels;
    let &[images, got_channels, height, width] = pixel_values.shape.as_slice() else {
        let problem = format!("has shape {:?}, expected [images, {channels}, H, W]", pixel_values.shape);
        return Err(file.error("pixel_values", &problem));
    };
    if got_channels != channels {
        let problem = format!("has {got_channels} channels, the model takes {channels}");
        return Err(file.error("pixel_values", &problem));
    }
    if sizes.shape != [images, 2] {
        let problem = format!("has shape {:?}, expected [{images}, 2] (height, width)", sizes.shape);
        return Err(file.error("image_sizes", &problem));
    }
    let (height, width) = (height as i64, width as i64);
    for (image, size) in sizes.values.chunks_exact(2).enumerate() {
        let (h, w) = (size[0], size[1]);
        if !(1..=height).contains(&h) || !(1..=width).contains(&w) {
            let problem =
                format!("gives image {image} {h}x{w} pixels, `pixel_values` holds {height}x{width}");
            return Err(file.error("image_sizes", &problem));
        }
    }
    let image_sizes = sizes.values.chunks_exact(2).map(|size| (size[0] as usize, size[1] as usize)).collect();
    Ok(Some(Pixels { pixel_values, image_sizes }))
}
