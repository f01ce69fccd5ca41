//! Reading and writing of weights.

mod check;
mod checkpoint;
mod decode;
mod dtype;
mod encode;
pub mod fp8;
mod host;
mod layout;
pub mod names;
mod native_names;
mod packed;
mod part;
mod quantize;
mod save;
mod shard;
mod sources;
mod writer;

pub use check::CheckReport;
pub use checkpoint::Checkpoint;
pub use decode::{RawTensor, Scale};
pub use dtype::{DType, StoredDType};
pub use host::{HostData, HostTensor};
pub(crate) use layout::Item;
pub use layout::SaveDType;
pub use mistral4_kernels::{Bits, QuantizedMatrix};
pub use quantize::{WeightFormat, WeightQuantization, quantize, stack_dims};
pub use save::{SaveOptions, SaveReport, convert, save};
pub(crate) use shard::Shard;
pub(crate) use writer::{PendingFile, header, sync_folder};
