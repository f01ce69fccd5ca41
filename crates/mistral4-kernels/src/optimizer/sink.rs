//! Weights that move while their gradients are multiplied out.
use super::adamw::{AdamW, AdamWState, Coefficients, step_chunk};
use crate::element::Element;
use crate::experts::{Block, Sink};
use crate::gemm::{Stretch, Upcoming};
use crate::isa::Isa;
use crate::parallel::Shared;
use crate::vector::convert;
use half::bf16;

/// Slices of a weight, whose gradient is a [`DeferredGradient`](crate::DeferredGradient).
#[derive(Debug)]
pub struct AdamWWeight<'a, P, S> {
    /// Weight, in full precision where it has a rounded copy.
    pub param: &'a mut [P],
    /// Where the weight is rounded to, if it is kept in bf16 as well.
    pub rounded: Option<&'a mut [bf16]>,
    /// First moment.
    pub exp_avg: &'a mut [S],
    /// Second moment.
    pub exp_avg_sq: &'a mut [S],
}

/// Steps a weight block by block.
pub(crate) struct StepSink<'a, P, S> {
    c: Coefficients,
    param: Shared<'a, P>,
    rounded: Option<Shared<'a, bf16>>,
    exp_avg: Shared<'a, S>,
    exp_avg_sq: Shared<'a, S>,
}

impl<'a, P: Element, S: Element> StepSink<'a, P, S> {
    pub(crate) fn new(hyper: &AdamW, step: u64, weight: AdamWWeight<'a, P, S>, len: usize) -> Self {
        let AdamWWeight { param, rounded, exp_avg, exp_avg_sq } = weight;
        assert!(param.len() == len && exp_avg.len() == len && exp_avg_sq.len() == len);
        assert!(rounded.as_ref().is_none_or(|rounded| rounded.len() == len));
        Self {
            c: hyper.coefficients(step),
            param: Shared::new(param),
            rounded: rounded.map(Shared::new),
            exp_avg: Shared::new(exp_avg),
            exp_avg_sq: Shared::new(exp_avg_sq),
        }
    }
}

impl<P: Element, S: Element> Sink for StepSink<'_, P, S> {
    // Long rows, so that memory delivers fast; a block with its states fits the second-level cache.
    const COLUMNS: usize = 2048;

    fn memory(&self, block: Block) -> [Stretch; 4] {
        let rounded = self.rounded.map_or(Stretch::NONE, |rounded| block.stretch(rounded));
        [block.stretch(self.param), block.stretch(self.exp_avg), block.stretch(self.exp_avg_sq), rounded]
    }

    unsafe fn take(&self, isa: Isa, block: Block, sums: &[f32], pitch: usize, next: &mut Upcoming) {
        for (row, sums) in sums.chunks_exact(pitch).take(block.rows).enumerate() {
            next.piece().fetch();
            let (grad, place) = (&sums[..block.columns], block.row(row));
            // SAFETY: promised by the caller.
            let (param, exp_avg, exp_avg_sq, rounded) = unsafe {
                (
                    self.param.slice(place.clone()),
                    self.exp_avg.slice(place.clone()),
                    self.exp_avg_sq.slice(place.clone()),
                    self.rounded.map(|rounded| rounded.slice(place.clone())),
                )
            };
            let state = AdamWState { param: &mut *param, grad, exp_avg, exp_avg_sq };
            step_chunk(isa, self.c, place.start as u32, state);
            if let Some(rounded) = rounded {
                convert(isa, param, rounded);
            }
        }
    }
}
