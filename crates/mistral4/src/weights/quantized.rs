//! Parameters that stay quantised in memory.

use std::collections::HashMap;

use mistral4_checkpoint::config::Config;
use mistral4_checkpoint::weights::names::{TensorSpec, tensors};
use mistral4_checkpoint::weights::{
    Checkpoint, DType, HostTensor, QuantizedMatrix, WeightQuantization, quantize,
};

use super::ParameterSource;
use crate::error::Result;

/// Parameters of another source, of which linears and experts are quantised one by one as they are asked for.
pub struct QuantizedSource<'a> {
    base: &'a dyn ParameterSource,
    checkpoint: Option<&'a Checkpoint>,
    quantization: Option<WeightQuantization>,
    specs: HashMap<String, TensorSpec>,
}

impl<'a> QuantizedSource<'a> {
    /// Quantises the values of `base`.
    pub fn new(base: &'a dyn ParameterSource, config: &Config, quantization: WeightQuantization) -> Self {
        Self { base, checkpoint: None, quantization: Some(quantization), specs: specs(config) }
    }

    /// Quantises a checkpoint's weights, or takes them as they are stored where they are stored so; without a
    /// `quantization`, packed integers stay as they are and everything else becomes dense.
    pub fn of_checkpoint(
        base: &'a dyn ParameterSource,
        checkpoint: &'a Checkpoint,
        quantization: Option<WeightQuantization>,
    ) -> Self {
        let specs = specs(checkpoint.config());
        Self { base, checkpoint: Some(checkpoint), quantization, specs }
    }
}

fn specs(config: &Config) -> HashMap<String, TensorSpec> {
    tensors(config).into_iter().map(|spec| (spec.key.clone(), spec)).collect()
}

impl ParameterSource for QuantizedSource<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        self.base.tensor(key, shape, f32)
    }

    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn quantized(&self, key: &str, shape: &[usize]) -> Result<Option<QuantizedMatrix>> {
        let Some(spec) = self.specs.get(key) else { return Ok(None) };
        assert_eq!(spec.shape, shape, "{key}: the table of names and the model differ");
        let weight = match (self.quantization, self.checkpoint) {
            (None, None) => None,
            (None, Some(checkpoint)) => checkpoint.packed(spec)?,
            (Some(quantization), source) => match (quantization.of(spec), source) {
                (None, _) => None,
                (Some(format), Some(checkpoint)) => Some(checkpoint.quantized(spec, format)?),
                (Some(format), None) => {
                    Some(quantize(spec, format, &self.base.tensor(key, shape, false)?.data)?)
                }
            },
        };
        Ok(weight)
    }
}
