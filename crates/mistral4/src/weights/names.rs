//! A model's parameters by name: the path of fields that leads to a parameter is its key in the checkpoint.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use crate::model::Mistral4;

/// A parameter, flattened.
#[derive(Debug, Clone)]
pub struct NamedTensor {
    /// Canonical key, for example `model.layers.0.mlp.gate.weight`.
    pub key: String,
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
            shape: values.dims().to_vec(),
            trainable: values.is_require_grad(),
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

impl<F: FnMut(&str, NamedValues) -> NamedValues> ModuleMapper for Replace<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let key = self.path.key();
        let replace = &mut self.replace;
        param.map(|tensor| {
            let old = (tensor.dims().to_vec(), tensor.flatten(0, D - 1));
            let (shape, values) = replace(&key, old);
            let shape: [usize; D] = shape.try_into().expect("a parameter keeps its number of axes");
            if shape.contains(&0) {
                // To `reshape`, 0 stands for the size that an axis has.
                return Tensor::zeros(shape, (&values.device(), values.dtype()));
            }
            values.reshape(shape)
        })
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
}

/// A parameter's shape and its flat values.
pub type NamedValues = (Vec<usize>, Tensor<1>);

/// Replaces the values of parameters: `replace` gets a key, a shape and flat values, and returns the values to keep.
///
/// The values are handed over: unless another clone of the module lives, `replace` may change them where they lie.
pub fn map_parameters<M: Module>(
    module: M,
    mut replace: impl FnMut(&str, &[usize], Tensor<1>) -> Tensor<1>,
) -> M {
    reshape_parameters(module, |key, (shape, values)| {
        let values = replace(key, &shape, values);
        (shape, values)
    })
}

/// As [`map_parameters`], with shapes, which may change as well but for their number of axes.
pub fn reshape_parameters<M: Module>(module: M, replace: impl FnMut(&str, NamedValues) -> NamedValues) -> M {
    module.map(&mut Replace { path: Path::default(), replace })
}

struct Collector<'a, F> {
    path: Path,
    gradients: &'a mut Gradients,
    sink: F,
}

impl<F: FnMut(String, Tensor<1>)> ModuleVisitor for Collector<'_, F> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad_remove(self.gradients) {
            (self.sink)(self.path.key(), gradient.flatten(0, D - 1));
        }
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
}

/// Takes the gradients of a module's parameters out of a backward pass: `sink` gets keys and flat gradients.
pub fn take_gradients<M: Module>(module: &M, gradients: &mut Gradients, sink: impl FnMut(String, Tensor<1>)) {
    module.visit(&mut Collector { path: Path::default(), gradients, sink });
}

struct Freeze<F> {
    path: Path,
    is_frozen: F,
}

impl<F: Fn(&str) -> bool> ModuleMapper for Freeze<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if (self.is_frozen)(&self.path.key()) { param.set_require_grad(false) } else { param }
    }

    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
}

impl Mistral4 {
    /// What stands before `model.` and `lm_head.` in the decoder's keys.
    pub fn text_prefix(&self) -> &'static str {
        match self {
            Mistral4::Text(_) => "",
            Mistral4::Multimodal(_) => "language_model.",
        }
    }

    /// The same model on its device's autodiff backend, parameters that are not frozen asking for gradients.
    pub fn train(&self) -> Self {
        match self {
            Mistral4::Text(model) => Mistral4::Text(Box::new(model.as_ref().clone().train())),
            Mistral4::Multimodal(model) => Mistral4::Multimodal(Box::new(model.as_ref().clone().train())),
        }
    }

    /// Every parameter with its canonical key; those of other stages have no elements.
    pub fn parameters(&self) -> Vec<NamedTensor> {
        // Only on the autodiff backend does a parameter tell whether it is trained.
        let mut parameters = match self.train() {
            Mistral4::Text(model) => named_parameters(model.as_ref()),
            Mistral4::Multimodal(model) => named_parameters(model.as_ref()),
        };
        parameters.iter_mut().for_each(|p| p.values = p.values.clone().inner());
        parameters
    }

    /// Replaces the values of parameters; see [`map_parameters`].
    pub fn map_parameters(self, replace: impl FnMut(&str, &[usize], Tensor<1>) -> Tensor<1>) -> Self {
        match self {
            Mistral4::Text(model) => Mistral4::Text(Box::new(map_parameters(*model, replace))),
            Mistral4::Multimodal(model) => Mistral4::Multimodal(Box::new(map_parameters(*model, replace))),
        }
    }

    /// Replaces the values and shapes of parameters; see [`reshape_parameters`].
    pub fn reshape_parameters(self, replace: impl FnMut(&str, NamedValues) -> NamedValues) -> Self {
        match self {
            Mistral4::Text(model) => Mistral4::Text(Box::new(reshape_parameters(*model, replace))),
            Mistral4::Multimodal(model) => {
                Mistral4::Multimodal(Box::new(reshape_parameters(*model, replace)))
            }
        }
    }

    /// Keeps the parameters whose keys `is_frozen` names from being trained.
    pub fn freeze(self, is_frozen: impl Fn(&str) -> bool) -> Self {
        let mut freeze = Freeze { path: Path::default(), is_frozen };
        match self {
            Mistral4::Text(model) => Mistral4::Text(Box::new(model.map(&mut freeze))),
            Mistral4::Multimodal(model) => Mistral4::Multimodal(Box::new(model.map(&mut freeze))),
        }
    }

    /// Takes the gradients of all parameters out of a backward pass of this model (as [`Mistral4::train`] gave it).
    pub fn take_gradients(&self, gradients: &mut Gradients, sink: impl FnMut(String, Tensor<1>)) {
        match self {
            Mistral4::Text(model) => take_gradients(model.as_ref(), gradients, sink),
            Mistral4::Multimodal(model) => take_gradients(model.as_ref(), gradients, sink),
        }
    }
}
