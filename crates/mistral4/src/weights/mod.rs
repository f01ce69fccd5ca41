//! Where parameters come from and where they go, by their names in the checkpoint.

mod adapted;
mod names;
mod partition;
mod quantized;
mod save;
mod source;

pub use adapted::{AdaptedSource, adapter_key, adapter_of, adapter_with, is_adapter};
pub use names::{
    NamedTensor, NamedValues, map_parameters, named_parameters, reshape_parameters, take_gradients,
};
pub use partition::{Part, Partition, PartitionSource, Share};
pub use quantized::QuantizedSource;
pub use save::host_tensor;
pub use source::{CheckpointSource, InitialSource, ParameterSource, Parameters, SourceAdapter};
