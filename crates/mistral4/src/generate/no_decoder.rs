//! Stands for the decoder where the CPU backend is not built in: there is none.

use crate::error::Result;
use crate::model::Mistral4;
use crate::model::cache::LatentCache;

/// There is none without the feature `flex`.
#[derive(Debug, Clone)]
pub enum Decoder {}

impl Decoder {
    /// `None`.
    pub fn take_over(_: &Mistral4, _: &mut LatentCache, _: usize) -> Option<Self> {
        None
    }

    /// Cannot be called.
    ///
    /// # Errors
    /// None.
    pub fn step(&mut self, _: u32, _: i64) -> Result<&mut [f32]> {
        match *self {}
    }
}
