//! A model's parameters by name: the path of fields that leads to a parameter is its key in the checkpoint.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::model::Mistral4;

/// A parameter, flattened.
#[derive(Debug, Clone)]
pub struct NamedTensor {
    /// Canonical key, for example `model.layers.0.mlp.gate.weight`.
    pub key: String,
    /// Identity of the parameter, by which its gradient is found.
    pub id: ParamId,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// The values, `[elements]`.
    pub values: Tensor<1>,
    /// Whether it is trained.
    pub trainable: bool,
}

#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    /// Variants of an enum have a level of their own in the walk, but no name in a checkpoint.
    fn is_variant(container_type: &str) -> bool {
        container_type.starts_with("Enum:")
    }

    fn enter(&mut self, name: &str, container_type: &str) {
        if !Self::is_variant(container_type) {
            self.0.push(name.to_string());
        }
    }

    fn exit(&mut self, container_type: &str) {
        if !Self::is_variant(container_type) {
            self.0.pop();
        }
    }

    fn key(&self) -> String {
        self.0.join(".")
    }
}

#[derive(Default)]
struct Collect {
    path: Path,
    found: Vec<NamedTensor>,
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val();
        self.found.push(NamedTensor {
            key: self.path.key(),
            id: param.id,
            shape: values.dims().to_vec(),
            trainable: param.is_require_grad(),
            values: values.flatten(0, D - 1),
        });
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
}

/// Every parameter of any module, keys relative to it.
pub fn named_parameters<M: Module>(module: &M) -> Vec<NamedTensor> {
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.found
}

struct Replace<F> {
    path: Path,
    replace: F,
}

impl<F: FnMut(&str, Tensor<1>) -> Option<Tensor<1>>> ModuleMapper for Replace<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let key = self.path.key();
        let replace = &mut self.replace;
        param.map(|tensor| {
            let shape = tensor.dims();
            match replace(&key, tensor.clone().flatten(0, D - 1)) {
                Some(values) => values.reshape(shape),
                None => tensor,
            }
        })
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
}

/// Replaces the values of parameters: `replace` gets a key and flat values and returns new ones, or `None` to keep.
pub fn map_parameters<M: Module>(module: M, replace: impl FnMut(&str, Tensor<1>) -> Option<Tensor<1>>) -> M {
    module.map(&mut Replace { path: Path::default(), replace })
}

impl Mistral4 {
    /// Every parameter with its canonical key.
    pub fn parameters(&self) -> Vec<NamedTensor> {
        match self {
            Mistral4::Text(model) => named_parameters(model),
            Mistral4::Multimodal(model) => named_parameters(model.as_ref()),
        }
    }
}
