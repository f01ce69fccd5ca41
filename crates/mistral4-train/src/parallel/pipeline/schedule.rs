//! In which order a rank runs its micro-batches forward and backward.

use std::ops::Range;

use crate::error::{Error, Result};

/// One pass of one micro-batch over one of the rank's runs of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Action {
    /// Forward or backward.
    pub pass: Pass,
    /// Micro-batch of the step.
    pub micro_batch: usize,
    /// Which of the rank's runs of layers: chunk `c` of rank `r` is stage `c * ranks + r`.
    pub chunk: usize,
}

/// Direction of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Activations go to the next stage.
    Forward,
    /// Gradients go to the stage before.
    Backward,
}

/// What rank `rank` of `ranks` does in a step, in this order.
///
/// With one chunk a rank it is 1F1B: the rank runs ahead by as many forward passes as there are ranks after it, then
/// alternates, so that it keeps at most `ranks - rank` micro-batches' activations. With several chunks it is interleaved
/// 1F1B: micro-batches go through in groups of `ranks`, each group through all chunks, which divides the idle time by
/// the number of chunks. A step whose micro-batches are no multiple of the ranks (the short end of an epoch) runs all
/// forward passes first when it is interleaved.
///
/// Source: Narayanan et al. 2021 (Megatron-LM), section 2.2; `forward_backward_pipelining_with_interleaving`.
pub fn actions(rank: usize, ranks: usize, chunks: usize, micro_batches: usize) -> Vec<Action> {
    let total = micro_batches * chunks;
    let ahead = match chunks {
        1 => ranks - rank - 1,
        _ if micro_batches.is_multiple_of(ranks) => 2 * (ranks - rank - 1) + (chunks - 1) * ranks,
        _ => total,
    };
    let ahead = ahead.min(total);
    let order = in_groups(ranks, chunks, micro_batches);
    let forward = |&(micro_batch, chunk): &(usize, usize)| Action { pass: Pass::Forward, micro_batch, chunk };
    let backward = |&(micro_batch, chunk): &(usize, usize)| {
        let chunk = chunks - 1 - chunk;
        Action { pass: Pass::Backward, micro_batch, chunk }
    };
    let mut actions: Vec<Action> = order[..ahead].iter().map(forward).collect();
    for (f, b) in order[ahead..].iter().zip(&order) {
        actions.extend([forward(f), backward(b)]);
    }
    actions.extend(order[total - ahead..].iter().map(backward));
    actions
}

/// Micro-batches and chunks: groups of `group` micro-batches, each through every chunk.
fn in_groups(group: usize, chunks: usize, micro_batches: usize) -> Vec<(usize, usize)> {
    let groups = (0..micro_batches).step_by(group).map(|first| first..(first + group).min(micro_batches));
    groups
        .flat_map(|group| (0..chunks).flat_map(move |chunk| group.clone().map(move |batch| (batch, chunk))))
        .collect()
}

/// The layers of each stage: as even as they come, the first stages taking what is left over.
///
/// # Errors
/// Fewer layers than stages, with the arithmetic.
pub fn split_layers(layers: usize, ranks: usize, chunks: usize) -> Result<Vec<Range<usize>>> {
    let stages = ranks * chunks;
    if layers < stages {
        return Err(Error::Inconsistent {
            key: "distributed.pp_size".to_owned(),
            value: ranks.to_string(),
            message: format!(
                "num_hidden_layers {layers} is less than the {stages} stages of pp_size {ranks} x {chunks} a rank"
            ),
        });
    }
    let first = |stage: usize| stage * (layers / stages) + stage.min(layers % stages);
    Ok((0..stages).map(|stage| first(stage)..first(stage + 1)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Runs all ranks' actions as their inputs come; returns the most activations that any rank keeps.
    fn run(ranks: usize, chunks: usize, micro_batches: usize) -> Vec<usize> {
        let last_stage = ranks * chunks - 1;
        let plans: Vec<Vec<Action>> =
            (0..ranks).map(|rank| actions(rank, ranks, chunks, micro_batches)).collect();
        let (mut at, mut kept, mut most) = (vec![0; ranks], vec![0usize; ranks], vec![0; ranks]);
        let mut done: HashSet<(Pass, usize, usize)> = HashSet::new();
        loop {
            let mut moved = false;
            for rank in 0..ranks {
                let Some(action) = plans[rank].get(at[rank]) else { continue };
                let stage = action.chunk * ranks + rank;
                let needs = match action.pass {
                    Pass::Forward if stage == 0 => None,
                    Pass::Forward => Some((Pass::Forward, stage - 1)),
                    Pass::Backward if stage == last_stage => Some((Pass::Forward, stage)),
                    Pass::Backward => Some((Pass::Backward, stage + 1)),
                };
                if needs.is_some_and(|(pass, stage)| !done.contains(&(pass, stage, action.micro_batch))) {
                    continue;
                }
                if action.pass == Pass::Backward {
                    assert!(
                        done.contains(&(Pass::Forward, stage, action.micro_batch)),
                        "forward comes first"
                    );
                    kept[rank] -= 1;
                } else {
                    kept[rank] += 1;
                    most[rank] = most[rank].max(kept[rank]);
                }
                assert!(done.insert((action.pass, stage, action.micro_batch)), "{action:?} twice");
                at[rank] += 1;
                moved = true;
            }
            if !moved {
                break;
            }
        }
        let case = format!("{ranks} ranks, {chunks} chunks, {micro_batches} micro-batches");
        assert_eq!(done.len(), 2 * (last_stage + 1) * micro_batches, "{case}: nobody waits for ever");
        most
    }

    #[test]
    fn every_schedule_ends_and_keeps_few_activations() {
        for ranks in 1..=6 {
            for micro_batches in 1..=13 {
                let most = run(ranks, 1, micro_batches);
                for (rank, most) in most.into_iter().enumerate() {
                    assert_eq!(most, (ranks - rank).min(micro_batches));
                }
                for chunks in 2..=4 {
                    let most = run(ranks, chunks, micro_batches);
                    if micro_batches % ranks == 0 {
                        let bound = |rank| 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1;
                        let enough = |(rank, most): (usize, usize)| most <= bound(rank);
                        assert!(most.into_iter().enumerate().all(enough));
                    }
                }
            }
        }
    }

    #[test]
    fn messages_between_two_ranks_are_taken_in_the_order_they_are_sent() {
        for (ranks, chunks, micro_batches) in [(2, 2, 4), (2, 3, 5), (3, 2, 6), (4, 2, 8), (4, 3, 7)] {
            let stages = ranks * chunks;
            for pass in [Pass::Forward, Pass::Backward] {
                for from in 0..ranks {
                    let of = |rank: usize| {
                        let plan = actions(rank, ranks, chunks, micro_batches);
                        plan.into_iter().filter(move |action| action.pass == pass)
                    };
                    let to = match pass {
                        Pass::Forward => (from + 1) % ranks,
                        Pass::Backward => (from + ranks - 1) % ranks,
                    };
                    // By the stage that is sent to.
                    let sent = of(from).filter_map(|action| {
                        let stage = action.chunk * ranks + from;
                        let next = match pass {
                            Pass::Forward => (stage + 1 < stages).then_some(stage + 1)?,
                            Pass::Backward => stage.checked_sub(1)?,
                        };
                        Some((next, action.micro_batch))
                    });
                    let taken = of(to).filter_map(|action| {
                        let stage = action.chunk * ranks + to;
                        let is_end = match pass {
                            Pass::Forward => stage == 0,
                            Pass::Backward => stage == stages - 1,
                        };
                        (!is_end).then_some((stage, action.micro_batch))
                    });
                    assert_eq!(sent.collect::<Vec<_>>(), taken.collect::<Vec<_>>());
                }
            }
        }
    }

    #[test]
    fn layers_are_split_evenly_and_refused_with_the_arithmetic() {
        assert_eq!(split_layers(7, 2, 2).unwrap(), [0..2, 2..4, 4..6, 6..7]);
        assert_eq!(split_layers(36, 4, 1).unwrap(), [0..9, 9..18, 18..27, 27..36]);
        let error = split_layers(3, 2, 2).unwrap_err().to_string();
        assert!(error.contains("num_hidden_layers 3 is less than the 4 stages of pp_size 2 x 2"), "{error}");
    }
}
