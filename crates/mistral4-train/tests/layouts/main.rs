//! Losses and gradients of every layout of a model over ranks are those of one rank, to rounding.

mod compare;
mod models;

use compare::{Layout, compare};
use mistral4::checkpoint::adapter::LoraSettings;
use mistral4::model::dropout::DropoutPosition;
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

/// LoRA on everything, stacked experts included, and DoRA on linear maps, both with dropout.
#[test]
fn adapters_in_every_layout() {
    let lora =
        LoraSettings { target_modules: vec!["*".into()], dim: 4, alpha: 4.0, ..LoraSettings::default() };
    let dora = LoraSettings {
        match_all_linear: true,
        dim: 4,
        alpha: 4.0,
        use_dora: true,
        ..LoraSettings::default()
    };
    for layout in [
        Layout { dp: 2, ep: 2, ..ONE },
        Layout { dp: 4, ep: 2, ..ONE },
        Layout { tp: 2, ..ONE },
        Layout { pp: 2, ..ONE },
        Layout { dp: 2, ep: 2, tp: 2, ..ONE },
        Layout { pp: 2, dp: 2, ep: 2, ..ONE },
    ] {
        let adapted = [
            multimodal().adapted(&lora, DropoutPosition::Pre),
            text().adapted(&lora, DropoutPosition::Post),
            text().adapted(&dora, DropoutPosition::Pre),
            multimodal().adapted(&dora, DropoutPosition::Post),
        ];
        for model in adapted {
            for activations in [Activations::Kept, Activations::Recomputed] {
                compare(&model, layout, activations);
            }
        }
    }
}
