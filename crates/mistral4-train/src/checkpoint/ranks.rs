//! Saving on many ranks: the first one writes the model, of which the others give it what they keep; every rank writes
//! its own of the optimizer's states; and all of them learn how it went.

use std::ops::Range;

use burn::tensor::{DType, TensorData};

use crate::error::{Error, Result};
use crate::optim::ParameterState;
use crate::parallel::sharding::BLOCK;
use crate::parallel::{Communicator, Holdings, Mesh};

/// A request that ends the giving of parts.
const END: u64 = u64::MAX;

/// The ranks of a run, as saving sees them, with messages of their own.
#[derive(Clone)]
pub(crate) struct Ranks {
    world: Communicator,
    /// Who keeps what; `None` where the first rank has the whole model.
    holdings: Option<Holdings>,
}

/// A state of the optimizer.
#[derive(Debug, Clone)]
pub(super) struct StateLabel {
    /// Its name, such as `exp_avg`.
    pub(super) name: String,
    /// Its parameter.
    pub(super) key: String,
    pub(super) dtype: DType,
}

impl StateLabel {
    const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::U8];

    fn to_line(&self) -> String {
        let dtype = Self::DTYPES.iter().position(|dtype| *dtype == self.dtype).expect("a dtype of states");
        format!("{}\t{}\t{dtype}", self.name, self.key)
    }

    fn from_line(line: &str) -> Self {
        let mut fields = line.split('\t');
        let mut next = || fields.next().expect("a line has three fields");
        let (name, key) = (next().to_owned(), next().to_owned());
        let dtype: usize = next().parse().expect("a number was written");
        Self { name, key, dtype: Self::DTYPES[dtype] }
    }
}

impl Ranks {
    /// The ranks of a mesh; collective.
    pub(crate) fn new(mesh: &Mesh, holdings: &Holdings) -> Self {
        let holdings = (!holdings.first_has_all()).then(|| holdings.clone());
        Self { world: mesh.world.duplicate(), holdings }
    }

    /// Whether this rank writes the model.
    pub(crate) fn is_first(&self) -> bool {
        self.world.is_first()
    }

    /// The whole shape of a parameter, of which this rank may keep `shape`.
    pub(super) fn shape<'a>(&'a self, key: &str, shape: Option<&'a [usize]>) -> &'a [usize] {
        match (&self.holdings, shape) {
            (Some(holdings), _) => holdings.shape(key),
            (None, Some(shape)) => shape,
            (None, None) => panic!("{key} is missing from the model"),
        }
    }

    /// States that any rank has, in the order of names and keys; collective.
    pub(super) fn all_states(&self, mut states: Vec<StateLabel>) -> Vec<StateLabel> {
        if self.holdings.is_some() {
            let lines: Vec<String> = states.iter().map(StateLabel::to_line).collect();
            let all = self.world.all_gather_varied(lines.join("\n").as_bytes()).into_iter();
            let texts: Vec<String> =
                all.map(|text| String::from_utf8(text).expect("keys are text")).collect();
            states = texts.iter().flat_map(|text| text.lines()).map(StateLabel::from_line).collect();
        }
        states.sort_unstable_by(|a, b| (&a.name, &a.key).cmp(&(&b.name, &b.key)));
        states.dedup_by(|a, b| (&a.name, &a.key) == (&b.name, &b.key));
        states
    }

    /// Where what this rank writes of a state lies among all of its values, flat; `None`: others write it.
    ///
    /// `elements` is the number of the parameter's values.
    pub(super) fn writes(&self, name: &str, key: &str, elements: usize) -> Option<Vec<Range<usize>>> {
        let of_blocks = name.ends_with(ParameterState::OF_BLOCKS);
        let Some(holdings) = &self.holdings else {
            let count = if of_blocks { elements.div_ceil(BLOCK) } else { elements };
            return self.is_first().then(|| std::iter::once(0..count).collect());
        };
        let (_, held) = holdings.keepers(key).into_iter().find(|(rank, _)| *rank == self.world.rank())?;
        Some(match of_blocks {
            true => held.blocks().expect("8-bit states are kept of whole blocks"),
            false => held.runs(),
        })
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

    /// Lets the first rank write, which finds whole tensors with [`Source::whole`], while the others give it what they
    /// keep, which `local` tells.
    pub(super) fn write<T>(
        &self,
        local: &dyn Fn(&str) -> Option<TensorData>,
        write: impl FnOnce(&Source<'_>) -> Result<T>,
    ) -> Result<Option<T>> {
        let source = Source { world: &self.world, holdings: self.holdings.as_ref(), local };
        if self.is_first() {
            let written = write(&source);
            source.end();
            return written.map(Some);
        }
        if let Some(holdings) = &self.holdings {
            source.give(holdings);
        }
        Ok(None)
    }
}

/// Where the first rank finds whole tensors.
pub(super) struct Source<'a> {
    world: &'a Communicator,
    holdings: Option<&'a Holdings>,
    local: &'a dyn Fn(&str) -> Option<TensorData>,
}

impl Source<'_> {
    /// The bytes of a parameter, whole.
    pub(super) fn whole(&self, key: &str) -> Vec<u8> {
        let mine = (self.local)(key);
        let Some(holdings) = self.holdings else {
            let mine = mine.unwrap_or_else(|| panic!("{key} is missing from the model"));
            return mine.as_bytes().to_vec();
        };
        let mut request = key.as_bytes().to_vec();
        self.world.broadcast(&mut [request.len() as u64], 0);
        self.world.broadcast(&mut request, 0);
        let elements: usize = holdings.shape(key).iter().product();
        let mut whole = Vec::new();
        for (rank, held) in holdings.keepers(key) {
            let part = match (rank, &mine) {
                (0, Some(mine)) => mine.as_bytes().to_vec(),
                _ => {
                    let mut length = [0u64];
                    self.world.receive(&mut length, rank);
                    let mut part = vec![0; length[0] as usize];
                    self.world.receive(&mut part, rank);
                    part
                }
            };
            // Parts without values say nothing about the width of one.
            if held.range.is_empty() {
                continue;
            }
            let width = part.len() / held.range.len();
            whole.resize(elements * width, 0);
            let mut rest = &part[..];
            for run in held.runs() {
                let (values, after) = rest.split_at(run.len() * width);
                whole[run.start * width..run.end * width].copy_from_slice(values);
                rest = after;
            }
        }
        whole
    }

    fn end(&self) {
        if self.holdings.is_some() {
            self.world.broadcast(&mut [END], 0);
        }
    }

    /// Gives the first rank what this one keeps of the tensors it asks for, until it has enough.
    fn give(&self, holdings: &Holdings) {
        loop {
            let mut length = [0u64];
            self.world.broadcast(&mut length, 0);
            if length[0] == END {
                return;
            }
            let mut request = vec![0u8; length[0] as usize];
            self.world.broadcast(&mut request, 0);
            let key = &String::from_utf8(request).expect("keys are text");
            if holdings.keepers(key).iter().all(|(rank, _)| *rank != self.world.rank()) {
                continue;
            }
            let part = (self.local)(key).expect("a keeper has what it keeps");
            self.world.send(&[part.as_bytes().len() as u64], 0);
            self.world.send(part.as_bytes(), 0);
        }
    }
}
