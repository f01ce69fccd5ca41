//! Checkpoints of a run: written whole or not at all, found again, and continued from bit for bit.
//!
//! A checkpoint is written under a name that starts with a dot, brought to the medium, and then renamed. What has its
//! name is complete; what has none is removed by the next run. Source of the layout: NVIDIA NeMo AutoModel,
//! `docs/guides/checkpointing.mdx` and `recipes/base_recipe.py`.

mod disk;
mod folder;
mod ranks;
mod saver;
mod snapshot;
mod tensors;

pub use disk::{Disk, Operation};
pub(crate) use folder::{Checkpoints, Completed};
pub(crate) use ranks::Ranks;
pub(crate) use saver::Saver;
pub(crate) use snapshot::{Losses, ModelFiles, Saved, Snapshot};
