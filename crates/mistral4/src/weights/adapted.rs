//! A model with low-rank adapters: where they come from, and what they are after training.

use std::collections::HashMap;
use std::ops::Range;

use mistral4_checkpoint::adapter::{Adapter, LoraTensors};
use mistral4_checkpoint::weights::{DType, HostTensor, QuantizedMatrix};

use super::{NamedTensor, ParameterSource, SourceAdapter, host_tensor};
use crate::error::Result;
use crate::model::Mistral4;
use crate::model::dropout::{Dropout, DropoutPosition, DropoutSeed};

/// Parameters of a base, and adapters for some of its modules.
pub struct AdaptedSource<'a> {
    base: &'a dyn ParameterSource,
    adapter: &'a Adapter,
    dropout: Option<(f64, DropoutPosition, DropoutSeed)>,
}

impl<'a> AdaptedSource<'a> {
    /// The adapters of `adapter` over the parameters of `base`.
    pub fn new(base: &'a dyn ParameterSource, adapter: &'a Adapter) -> Self {
        Self { base, adapter, dropout: None }
    }

    /// The same with dropout in the adapters of linear maps, on whenever `seed` is set; stacked experts have none.
    ///
    /// Source: `LinearLoRA` and `GroupedExpertsLoRA` in NeMo AutoModel.
    pub fn with_dropout(self, probability: f64, position: DropoutPosition, seed: DropoutSeed) -> Self {
        Self { dropout: Some((probability, position, seed)), ..self }
    }
}

impl ParameterSource for AdaptedSource<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        let base = self.base.tensor(key, shape, f32)?;
        Ok(match self.adapter.replaced.get(key) {
            Some(replaced) => replaced.clone().cast(base.dtype()),
            None => base,
        })
    }

    fn part(&self, key: &str, shape: &[usize], f32: bool, range: Range<usize>) -> Result<HostTensor> {
        if self.adapter.replaced.contains_key(key) {
            return Ok(self.tensor(key, shape, f32)?.part(range));
        }
        self.base.part(key, shape, f32, range)
    }

    fn quantized(&self, key: &str, shape: &[usize]) -> Result<Option<QuantizedMatrix>> {
        if self.adapter.replaced.contains_key(key) { Ok(None) } else { self.base.quantized(key, shape) }
    }

    fn dtype(&self) -> DType {
        self.base.dtype()
    }

    fn adapter(&self, module: &str, shape: &[usize]) -> Result<Option<SourceAdapter>> {
        let Some(tensors) = self.adapter.modules.get(module) else { return Ok(None) };
        assert_eq!(tensors.weight_shape(), shape, "{module}: shapes are compared when an adapter is opened");
        let dropout = self.dropout.as_ref().filter(|_| shape.len() == 2);
        let dropout =
            dropout.map(|(share, position, seed)| Dropout::new(*share, *position, module, seed.clone()));
        Ok(Some(SourceAdapter { tensors: tensors.clone(), dropout }))
    }
}

impl Mistral4 {
    /// Keeps everything but adapters from being trained.
    pub fn freeze_base(self) -> Self {
        self.freeze(|key| split(key).is_none())
    }
}

/// The adapter `like`, with the values that the parameters of a model (or of one in training) have now.
///
/// # Panics
/// When the parameters lack one of its matrices.
pub fn adapter_of(parameters: &[NamedTensor], like: &Adapter) -> Adapter {
    let parameters: HashMap<&str, &NamedTensor> = parameters.iter().map(|p| (p.key.as_str(), p)).collect();
    adapter_with(like, |key| {
        let parameter = parameters.get(key).unwrap_or_else(|| panic!("{key} is missing from the model"));
        host_tensor((*parameter).clone())
    })
}

/// The adapter `like` with other values, which `values` gives by the keys that they have in a model.
pub fn adapter_with(like: &Adapter, mut values: impl FnMut(&str) -> HostTensor) -> Adapter {
    let now = |(module, old): (&String, &LoraTensors)| {
        let axes = old.a.shape.len();
        let mut part = |part: &str| values(&adapter_key(module, axes, part));
        let (a, b) = (part("a"), part("b"));
        let magnitude = old.magnitude.as_ref().map(|_| part("magnitude"));
        (module.clone(), LoraTensors { a, b, magnitude, scale: old.scale })
    };
    let modules = like.modules.iter().map(now).collect();
    let Adapter { replaced, base_model, rank, alpha, .. } = like;
    Adapter {
        modules,
        replaced: replaced.clone(),
        base_model: base_model.clone(),
        rank: *rank,
        alpha: *alpha,
    }
}

impl SourceAdapter {
    /// The same with every tensor replaced, given its key as a parameter; `None`: one of them is not here.
    pub(super) fn map(
        self,
        module: &str,
        mut change: impl FnMut(&str, HostTensor) -> Option<HostTensor>,
    ) -> Option<Self> {
        let LoraTensors { a, b, magnitude, scale } = self.tensors;
        let axes = a.shape.len();
        let mut part = |part: &str, tensor| change(&adapter_key(module, axes, part), tensor);
        let (a, b) = (part("a", a)?, part("b", b)?);
        let magnitude = match magnitude {
            Some(magnitude) => Some(part("magnitude", magnitude)?),
            None => None,
        };
        Some(Self { tensors: LoraTensors { a, b, magnitude, scale }, dropout: self.dropout })
    }

    /// Keys as parameters, and shapes.
    pub fn shapes(&self, module: &str) -> impl Iterator<Item = (String, Vec<usize>)> {
        let LoraTensors { a, b, magnitude, .. } = &self.tensors;
        let axes = a.shape.len();
        let parts = [("a", Some(a)), ("b", Some(b)), ("magnitude", magnitude.as_ref())];
        let shape = |(part, tensor): (&str, Option<&HostTensor>)| {
            Some((adapter_key(module, axes, part), tensor?.shape.clone()))
        };
        parts.into_iter().filter_map(shape).collect::<Vec<_>>().into_iter()
    }
}

/// Whether a parameter belongs to an adapter.
pub fn is_adapter(key: &str) -> bool {
    split(key).is_some()
}

/// The key of an adapter's parameter `a`, `b` or `magnitude`: of a stack of experts, whose weight has three axes, or of a
/// linear map.
pub fn adapter_key(module: &str, axes: usize, part: &str) -> String {
    let join = if axes == 3 { "_" } else { "." };
    format!("{module}{join}lora.{part}")
}

/// Module and part of the key of an adapter's parameter.
pub(super) fn split(key: &str) -> Option<(&str, &str)> {
    key.rsplit_once(".lora.").or_else(|| key.rsplit_once("_lora."))
}
