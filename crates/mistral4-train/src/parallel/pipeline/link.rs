//! Hidden states and their gradients on the way from stage to stage.

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::bf16;

use crate::error::{Error, Result};
use crate::parallel::{Communicator, Lane, Pending};

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Message {
    /// The stage that it is for.
    pub(super) stage: usize,
    /// The micro-batch.
    pub(super) micro_batch: usize,
    /// Tokens.
    pub(super) tokens: usize,
}

/// One direction of a pipeline. Sending never waits for the receiver, so that ranks cannot wait for each other.
pub(super) struct Link {
    ranks: Communicator,
    lane: Lane,
}

impl Link {
    /// A link between the ranks of a pipeline; collective.
    pub(super) fn new(ranks: &Communicator) -> Self {
        Self { ranks: ranks.duplicate(), lane: Lane::new(ranks) }
    }

    /// Begins to send `[T, D]` to a rank.
    pub(super) fn send(&self, to: usize, message: Message, values: Tensor<2>) -> Pending<()> {
        let [tokens, width] = values.dims();
        let data = values.into_data();
        let size = data.dtype().size();
        let header = [message.stage, message.micro_batch, tokens, width, size].map(|field| field as u64);
        let ranks = self.ranks.clone();
        self.lane.start(move |_| {
            ranks.send(&header, to);
            ranks.send(data.as_bytes(), to);
        })
    }

    /// Waits for `[T, D]` from a rank.
    ///
    /// # Errors
    /// A message of other tokens than this rank's: the ranks read different batches.
    pub(super) fn receive(&self, from: usize, expected: Message, device: &Device) -> Result<Tensor<2>> {
        let mut header = [0u64; 5];
        self.ranks.receive(&mut header, from);
        let [stage, micro_batch, tokens, width, size] = header.map(|field| field as usize);
        let message = Message { stage, micro_batch, tokens };
        if message != expected {
            return Err(Error::Pipeline { from, got: message.to_string(), expected: expected.to_string() });
        }
        let count = tokens * width;
        Ok(match size {
            4 => {
                let mut values = vec![0f32; count];
                self.ranks.receive(&mut values, from);
                Tensor::from_data(TensorData::new(values, [tokens, width]), (device, DType::F32))
            }
            2 => {
                let mut values = vec![bf16::ZERO; count];
                self.ranks.receive(&mut values, from);
                Tensor::from_data(TensorData::new(values, [tokens, width]), (device, DType::BF16))
            }
            other => unreachable!("models compute in f32 and bf16, not in numbers of {other} bytes"),
        })
    }
}

impl std::fmt::Display for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { stage, micro_batch, tokens } = self;
        write!(f, "{tokens} tokens of micro-batch {micro_batch} for stage {stage}")
    }
}
