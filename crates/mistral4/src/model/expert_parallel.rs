//! Routed experts that are spread over ranks: each token's row travels to the owners of its experts and back.
//!
//! A row goes once to each rank that holds any of the token's experts, with the list of those experts and their weights;
//! the owner adds up what its experts make of it, so that one row comes back as well. No token is dropped, and a rank
//! with no tokens, or experts that nobody chose, take part with empty exchanges.
//!
//! Source: Lepikhin et al. 2020 (GShard), section 3.1; one row a rank as in DeepEP.

use std::sync::Arc;

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use crate::model::experts::Experts;
use crate::model::gate::Routing;
use crate::ops::Group;
use crate::ops::collective::{Exchange, all_to_all_rows, all_to_all_values};

/// What the experts of all ranks, `experts` on this one, make of this rank's tokens.
///
/// # Shapes
/// - `x`: `[T, D]`, output: `[T, D]`
pub(super) fn routed(
    experts: &Experts,
    group: &Arc<dyn Group>,
    x: Tensor<2>,
    routing: &Routing,
) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let (indices, weights) = (routing.indices.clone(), routing.weights.clone());
    let [_, top_k] = indices.dims();
    let per_rank = routing.load.len() / group.size();
    let device = x.device().without_autodiff();
    let index = |values: Vec<i64>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let indices: Vec<i64> = indices.into_data_as::<i64>().try_into_vec().expect("just converted to i64");
    let Outgoing { tokens: home, rows, choices, pairs, messages, lengths } =
        Outgoing::new(&indices, top_k, per_rank, group.size());
    let (messages, lengths) = all_to_all_values(group.as_ref(), &messages, &lengths);
    let incoming = Incoming::new(&messages, &lengths);
    let exchange = |send: Vec<usize>, receive: Vec<usize>| Exchange {
        group: group.clone(),
        send: send.into(),
        receive: receive.into(),
    };
    let row_exchange = exchange(rows, incoming.row_counts);
    let pair_exchange = exchange(pairs, incoming.pair_counts);

    let home = index(home);
    let x = all_to_all_rows(tracked(x).select(0, home.clone()), &row_exchange);
    let weights = tracked(weights).reshape([tokens * top_k, 1]).select(0, index(choices));
    let weights = all_to_all_rows(weights, &pair_exchange);

    let pairs = incoming.rows.len();
    let rows = index(incoming.rows);
    let chosen = index(incoming.experts).reshape([pairs, 1]);
    let arrived = Routing { indices: chosen, weights, load: Vec::new(), aux_loss: None, z_loss: None };
    let y = experts.forward(x.clone().select(0, rows.clone()), &arrived);
    let y = x.zeros_like().select_assign(0, rows, y, IndexingUpdateOp::Add);

    let y = all_to_all_rows(y, &row_exchange.reversed());
    let out = Tensor::<2>::zeros([tokens, width], (&y.device(), y.dtype()));
    out.select_assign(0, home, y, IndexingUpdateOp::Add)
}

/// In training, makes the gradient reach the exchange on every rank: the ranks' backward passes must meet there, also
/// where one has nothing to train below.
fn tracked(x: Tensor<2>) -> Tensor<2> {
    if x.device().is_autodiff() && !x.is_tracked() { x.require_grad() } else { x }
}

/// What this rank sends, in the order of ranks.
struct Outgoing {
    /// Token of each row.
    tokens: Vec<i64>,
    /// Rows to each rank.
    rows: Vec<usize>,
    /// Choice (`token * K + k`) behind each pair of a row and an expert.
    choices: Vec<i64>,
    /// Pairs to each rank.
    pairs: Vec<usize>,
    /// To each rank: the number of rows, then of each pair the row and the expert, counted within the rank.
    messages: Vec<i32>,
    /// Length of each message.
    lengths: Vec<usize>,
}

impl Outgoing {
    fn new(indices: &[i64], top_k: usize, per_rank: usize, ranks: usize) -> Self {
        let (mut tokens, mut choices, mut messages) =
            (Vec::new(), Vec::with_capacity(indices.len()), Vec::new());
        let (mut rows, mut pairs, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for rank in 0..ranks {
            let start = (tokens.len(), choices.len(), messages.len());
            messages.push(0);
            for (token, experts) in indices.chunks_exact(top_k).enumerate() {
                let row = (tokens.len() - start.0) as i32;
                let before = choices.len();
                for (k, &expert) in experts.iter().enumerate() {
                    if expert as usize / per_rank == rank {
                        choices.push((token * top_k + k) as i64);
                        messages.extend([row, (expert as usize % per_rank) as i32]);
                    }
                }
                if choices.len() > before {
                    tokens.push(token as i64);
                }
            }
            rows.push(tokens.len() - start.0);
            pairs.push(choices.len() - start.1);
            messages[start.2] = rows[rank] as i32;
            lengths.push(messages.len() - start.2);
        }
        Self { tokens, rows, choices, pairs, messages, lengths }
    }
}

/// What comes to this rank, in the order of ranks.
struct Incoming {
    row_counts: Vec<usize>,
    pair_counts: Vec<usize>,
    /// Received row of each pair.
    rows: Vec<i64>,
    /// Expert of each pair, among those of this rank.
    experts: Vec<i64>,
}

impl Incoming {
    fn new(mut messages: &[i32], lengths: &[usize]) -> Self {
        let mut incoming =
            Self { row_counts: Vec::new(), pair_counts: Vec::new(), rows: Vec::new(), experts: Vec::new() };
        let mut first = 0;
        for &length in lengths {
            let (message, rest) = messages.split_at(length);
            messages = rest;
            for pair in message[1..].chunks_exact(2) {
                incoming.rows.push(first + i64::from(pair[0]));
                incoming.experts.push(i64::from(pair[1]));
            }
            first += i64::from(message[0]);
            incoming.row_counts.push(message[0] as usize);
            incoming.pair_counts.push((length - 1) / 2);
        }
        incoming
    }
}
