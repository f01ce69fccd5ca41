//! Reading and writing of weights.

mod check;
mod checkpoint;
mod decode;
mod dtype;
pub mod fp8;
mod host;
pub mod names;
mod native_names;
mod shard;
mod sources;

pub use check::CheckReport;
pub use checkpoint::Checkpoint;
pub use decode::{RawTensor, Scale};
pub use dtype::{DType, StoredDType};
pub use host::{HostData, HostTensor};
