//! Saving on many ranks: the first one writes, the others give it their parts, and all of them learn how it went.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::TensorData;

use crate::error::{Error, Result};
use crate::parallel::{Communicator, Mesh, Sharding};

/// A request that ends the giving of parts.
const END: u64 = u64::MAX;

/// The ranks of a run, as saving sees them, with messages of their own.
#[derive(Clone)]
pub(crate) struct Ranks {
    world: Communicator,
    /// `None` where every rank has the whole model.
    parts: Option<Parts>,
}

/// Ranks that hold a model together.
#[derive(Clone)]
struct Parts {
    group: Communicator,
    /// Whole shapes of what is spread.
    shapes: Arc<HashMap<String, Vec<usize>>>,
    /// Whether this rank's replica is the one that is saved.
    gives: bool,
}

impl Ranks {
    /// The ranks of a mesh; collective.
    pub(crate) fn new(mesh: &Mesh, sharding: Option<&Sharding>) -> Self {
        let parts = sharding.map(|sharding| Parts {
            group: sharding.group().duplicate(),
            shapes: sharding.shapes(),
            gives: mesh.place.dp_replicate == 0,
        });
        Self { world: mesh.world.duplicate(), parts }
    }

    /// Whether this rank writes.
    pub(crate) fn is_first(&self) -> bool {
        self.world.is_first()
    }

    /// The whole shape of a parameter, of which this rank holds `shape`.
    pub(crate) fn shape(&self, key: &str, shape: &[usize]) -> Vec<usize> {
        let whole = self.parts.as_ref().and_then(|parts| parts.shapes.get(key));
        whole.map_or(shape, Vec::as_slice).to_vec()
    }

    /// Fails on every rank when it failed on one.
    pub(crate) fn agree<T>(&self, result: Result<T>) -> Result<T> {
        let message = result.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let messages = self.world.all_gather_varied(message.as_bytes());
        let result = result?;
        match messages.iter().position(|message| !message.is_empty()) {
            None => Ok(result),
            Some(rank) => {
                let message = String::from_utf8_lossy(&messages[rank]).into_owned();
                Err(Error::OtherRank { rank, message })
            }
        }
    }

    /// Lets the first rank write, which finds whole tensors with [`Source::whole`], while the others give it their parts
    /// of the tensors that `local` tells by number.
    pub(super) fn write<T>(
        &self,
        local: &dyn Fn(usize) -> (String, TensorData),
        write: impl FnOnce(&Source<'_>) -> Result<T>,
    ) -> Result<Option<T>> {
        let source = Source { parts: self.parts.as_ref(), local };
        if self.is_first() {
            let written = write(&source);
            source.end();
            return written.map(Some);
        }
        if let Some(parts) = self.parts.as_ref().filter(|parts| parts.gives) {
            source.give(&parts.group);
        }
        Ok(None)
    }
}

/// Where the first rank finds whole tensors.
pub(super) struct Source<'a> {
    parts: Option<&'a Parts>,
    local: &'a dyn Fn(usize) -> (String, TensorData),
}

impl Source<'_> {
    /// The bytes of the tensor `index`, whole.
    pub(super) fn whole(&self, index: usize) -> Vec<u8> {
        let (key, mine) = (self.local)(index);
        let mut bytes = mine.as_bytes().to_vec();
        let Some(parts) = self.parts.filter(|parts| parts.shapes.contains_key(&key)) else { return bytes };
        parts.group.broadcast(&mut [index as u64], 0);
        for rank in 1..parts.group.size() {
            let mut length = [0u64];
            parts.group.receive(&mut length, rank);
            let start = bytes.len();
            bytes.resize(start + length[0] as usize, 0);
            parts.group.receive(&mut bytes[start..], rank);
        }
        bytes
    }

    fn end(&self) {
        if let Some(parts) = self.parts {
            parts.group.broadcast(&mut [END], 0);
        }
    }

    /// Gives this rank's parts of what the first rank asks for, until it has enough.
    fn give(&self, group: &Communicator) {
        loop {
            let mut request = [0u64];
            group.broadcast(&mut request, 0);
            if request[0] == END {
                return;
            }
            let (_, part) = (self.local)(request[0] as usize);
            group.send(&[part.as_bytes().len() as u64], 0);
            group.send(part.as_bytes(), 0);
        }
    }
}
