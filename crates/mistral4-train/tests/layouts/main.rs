//! Losses and gradients of every layout of a model over ranks are those of one rank, to rounding.

mod compare;
mod models;

use compare::{Layout, compare};
use mistral4_train::backward::Activations;
use models::{multimodal, text};

const ONE: Layout = Layout { pp: 1, chunks: 1, dp: 1, tp: 1, ep: 1 };

/// Text and multimodal, with activations kept and recomputed.
fn check(layout: Layout) {
    for model in [text(), multimodal()] {
        for activations in [Activations::Kept, Activations::Recomputed] {
            compare(&model, layout, activations);
        }
    }
}

#[test]
fn experts_over_ranks() {
    check(Layout { dp: 2, ep: 2, ..ONE });
    check(Layout { dp: 4, ep: 4, ..ONE });
}

#[test]
fn experts_over_ranks_in_replicas() {
    check(Layout { dp: 4, ep: 2, ..ONE });
}

#[test]
fn heads_and_columns_over_ranks() {
    check(Layout { tp: 2, ..ONE });
    check(Layout { tp: 4, ..ONE });
}

#[test]
fn layers_over_ranks() {
    check(Layout { pp: 2, ..ONE });
    check(Layout { pp: 4, ..ONE });
}

#[test]
fn layers_over_ranks_interleaved() {
    check(Layout { pp: 2, chunks: 2, ..ONE });
}

#[test]
fn everything_at_once() {
    check(Layout { pp: 2, dp: 2, ep: 2, ..ONE });
    check(Layout { pp: 2, tp: 2, ..ONE });
    check(Layout { dp: 2, ep: 2, tp: 2, ..ONE });
}
