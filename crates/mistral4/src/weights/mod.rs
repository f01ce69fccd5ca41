//! Where parameters come from and where they go, by their names in the checkpoint.

mod names;
mod source;

pub use names::{NamedTensor, map_parameters, named_parameters};
pub use source::{CheckpointSource, InitialSource, ParameterSource, Parameters};
