//! Collective operations: what ranks that hold parts of one model compute together.
//!
//! The model sees its companions through [`Group`] alone; who carries the messages is the caller's business. Each
//! operation has its counterpart as its gradient: a sum forward is a copy backward and the other way round, an exchange
//! of rows runs back. Every rank of a group must call the same operations in the same order, backward passes included.
//!
//! Source: Shoeybi et al. 2019 (Megatron-LM), section 3, where the two sums are called `g` and `f`.

#[cfg(feature = "flex")]
mod autodiff;
#[cfg(feature = "flex")]
mod extension;

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;

/// Ranks that compute together.
///
/// A rank that is lost ends the whole run, so that no method reports an error.
pub trait Group: Debug + Send + Sync {
    /// This rank, counted within the group.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Replaces `values` by their sum over all ranks, the same bits on each.
    fn all_reduce_sum(&self, values: &mut [f32]);

    /// Sends a run of bytes to each rank and receives one from each, in the order of ranks.
    ///
    /// Counts are bytes: `send_counts[r]` go to rank `r`, `receive_counts[r]` come from it.
    fn all_to_all(&self, send: &[u8], send_counts: &[usize], receive: &mut [u8], receive_counts: &[usize]);
}

/// Rows that go to and come from each rank of a group.
#[derive(Debug, Clone)]
pub struct Exchange {
    /// The ranks.
    pub group: Arc<dyn Group>,
    /// Rows sent to each rank, which lie in the order of ranks.
    pub send: Arc<[usize]>,
    /// Rows received from each rank.
    pub receive: Arc<[usize]>,
}

impl Exchange {
    /// The exchange that takes every row back to where it came from.
    pub fn reversed(&self) -> Self {
        Self { group: self.group.clone(), send: self.receive.clone(), receive: self.send.clone() }
    }
}

/// The sum of the ranks' partial results, on every rank; its gradient is the gradient of the sum.
///
/// # Shapes
/// - `x`: any, the same on every rank; output: as `x`
pub fn reduce_from_group<const D: usize>(x: Tensor<D>, group: &Option<Arc<dyn Group>>) -> Tensor<D> {
    match group {
        #[cfg(feature = "flex")]
        Some(group) => extension::reduce_from_group(x, group.clone()),
        #[cfg(not(feature = "flex"))]
        Some(_) => unsupported(),
        None => x,
    }
}

/// The same values, of which every rank computes a part of the result; their gradient is the sum of the ranks'.
///
/// # Shapes
/// - `x`: any, the same on every rank; output: as `x`
pub fn copy_to_group<const D: usize>(x: Tensor<D>, group: &Option<Arc<dyn Group>>) -> Tensor<D> {
    match group {
        #[cfg(feature = "flex")]
        Some(group) => extension::copy_to_group(x, group.clone()),
        #[cfg(not(feature = "flex"))]
        Some(_) => unsupported(),
        None => x,
    }
}

/// Rows sent to their ranks, and the rows received; gradients go the way back.
///
/// # Shapes
/// - `x`: `[rows sent, D]`, output: `[rows received, D]`
pub fn all_to_all_rows(x: Tensor<2>, exchange: &Exchange) -> Tensor<2> {
    #[cfg(feature = "flex")]
    return extension::all_to_all_rows(x, exchange.clone());
    #[cfg(not(feature = "flex"))]
    {
        let _ = (x, exchange);
        unsupported()
    }
}

/// Sends a run of `values` to each rank, `send[r]` to rank `r`; returns what came, and how many from each rank.
pub fn all_to_all_values(group: &dyn Group, values: &[i32], send: &[usize]) -> (Vec<i32>, Vec<usize>) {
    const SIZE: usize = size_of::<i32>();
    let each = vec![SIZE; group.size()];
    let counts: Vec<i32> = send.iter().map(|&count| i32::try_from(count).expect("rows fit i32")).collect();
    let mut incoming = vec![0i32; group.size()];
    group.all_to_all(bytemuck::cast_slice(&counts), &each, bytemuck::cast_slice_mut(&mut incoming), &each);
    let incoming: Vec<usize> = incoming.into_iter().map(|count| count as usize).collect();
    let bytes = |counts: &[usize]| counts.iter().map(|count| count * SIZE).collect::<Vec<_>>();
    let mut received = vec![0i32; incoming.iter().sum()];
    let target = bytemuck::cast_slice_mut(&mut received);
    group.all_to_all(bytemuck::cast_slice(values), &bytes(send), target, &bytes(&incoming));
    (received, incoming)
}

#[cfg(not(feature = "flex"))]
fn unsupported() -> ! {
    panic!("models over several ranks run on the CPU backend, which this build lacks")
}
