//! The decoder behind a vision tower and a projector.

use burn::module::Module;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use mistral4_checkpoint::config::Config;

use crate::error::{Error, Result};
use crate::inputs::{Images, ModelInputs};
use crate::model::moe::MoeOptions;
use crate::model::text::Mistral4ForCausalLM;
use crate::vision::{MultiModalProjector, PixtralVisionModel};
use crate::weights::Parameters;

/// Pixtral tower, projector and decoder.
#[derive(Module, Debug)]
pub struct Mistral3ForConditionalGeneration {
    /// The decoder with its head.
    pub language_model: Mistral4ForCausalLM,
    /// The Pixtral tower.
    pub vision_tower: PixtralVisionModel,
    /// From the tower's features to the decoder's embeddings.
    pub multi_modal_projector: MultiModalProjector,
    /// Token that stands for one merged patch.
    pub image_token_index: u32,
}

impl Mistral3ForConditionalGeneration {
    /// Takes the three parts from `parameters`.
    ///
    /// # Errors
    /// A missing or mis-shaped tensor, or a config without a vision part.
    pub fn new(config: &Config, moe: MoeOptions, parameters: &Parameters) -> Result<Self> {
        let vision = config.vision.as_ref().ok_or(Error::NoVision)?;
        Ok(Self {
            language_model: Mistral4ForCausalLM::new(config, moe, &parameters.pp("language_model"))?,
            vision_tower: PixtralVisionModel::new(&vision.vision_config, &parameters.pp("vision_tower"))?,
            multi_modal_projector: MultiModalProjector::new(
                vision,
                &config.text,
                &parameters.pp("multi_modal_projector"),
            )?,
            image_token_index: vision.image_token_index,
        })
    }

    /// Features of the images, one row a merged patch, in the decoder's width.
    ///
    /// # Shapes
    /// - output: `[merged patches of all images, D]`
    ///
    /// # Errors
    /// Image sizes that do not fit the pixels.
    pub fn image_features(&self, images: &Images) -> Result<Tensor<2>> {
        let (features, grids) =
            self.vision_tower.forward(images, self.multi_modal_projector.vision_feature_layer)?;
        Ok(self.multi_modal_projector.forward(features, &grids))
    }

    /// Token embeddings with the images' features in the places of the image tokens.
    ///
    /// # Shapes
    /// - output: `[T, D]`
    ///
    /// # Errors
    /// Image tokens and features that differ in number.
    pub fn embed(&self, inputs: &ModelInputs, images: &Images) -> Result<Tensor<2>> {
        let Some(ids) = &inputs.input_ids else {
            return Err(Error::Unsupported(
                "images go with input_ids, which say where their features belong".into(),
            ));
        };
        let embeds = self.language_model.model.embed(inputs);
        self.place_features(embeds, ids, self.image_features(images)?)
    }

    /// Puts one feature row in the place of each image token.
    ///
    /// # Errors
    /// Image tokens and features that differ in number.
    pub fn place_features(&self, embeds: Tensor<2>, ids: &[u32], features: Tensor<2>) -> Result<Tensor<2>> {
        let places: Vec<i64> =
            (0..ids.len()).filter(|&i| ids[i] == self.image_token_index).map(|i| i as i64).collect();
        let [count, width] = features.dims();
        if places.len() != count {
            let (tokens, image_token_index) = (places.len(), self.image_token_index);
            return Err(Error::ImageTokens { tokens, features: count, image_token_index });
        }
        let dtype = embeds.dtype();
        let device = embeds.device().without_autodiff();
        let mut keep = vec![1.0f32; ids.len()];
        places.iter().for_each(|&i| keep[i as usize] = 0.0);
        let keep = Tensor::<2>::from_data(TensorData::new(keep, [ids.len(), 1]), &device).cast(dtype);
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
        let placed = Tensor::<2>::zeros([ids.len(), width], (&features.device(), dtype)).select_assign(
            0,
            places,
            features.cast(dtype),
            IndexingUpdateOp::Add,
        );
        Ok(embeds * keep + placed)
    }
}
