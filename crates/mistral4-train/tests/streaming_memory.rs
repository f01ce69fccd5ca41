//! Text is streamed: alone in its own process, so that nothing else takes memory.
#![cfg(target_os = "linux")]

use std::sync::Arc;

use mistral4_processor::Processor;
use mistral4_processor::tokenizer::TekkenBuilder;
use mistral4_train::data::{self, DataContext, DataRank, Loader, LoaderOptions};
use mistral4_train::recipe::Recipe;

/// Reads of 128 MiB of text, packed, shuffled and made ahead, and looks at what the process grows by.
#[test]
fn a_large_text_file_is_read_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.txt");
    let line = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n";
    std::fs::write(&path, line.repeat((128 << 20) / line.len())).unwrap();
    let recipe = format!(
        "recipe: TrainFinetuneRecipeForNextTokenPrediction\nmodel: {{config: tiny}}\n\
         dataset: {{_target_: text, path_or_dataset: {}, seq_length: 128}}\n\
         packed_sequence: {{packed_sequence_size: 256, buffer_size: 64}}\n\
         dataloader: {{shuffle_buffer_size: 128}}\n\
         step_scheduler: {{global_batch_size: 16, local_batch_size: 2}}\n",
        path.display()
    );
    let recipe = Recipe::parse("r.yaml", recipe.as_bytes(), &[], &|_| None).unwrap();
    let file = TekkenBuilder::new(400).train([line]).unwrap();
    let processor = Some(Arc::new(Processor::new(file.tokenizer().unwrap(), None)));
    let context = DataContext { processor, vocab_size: 400, seed: 1 };
    let source = data::open(&recipe.dataset, &context).unwrap();
    let mut loader = Loader::new(source, LoaderOptions::training(&recipe, 0), DataRank::SINGLE).unwrap();
    (0..10).for_each(|_| drop(loader.next_step().unwrap()));
    let before = resident_mib();
    let (mut most, mut tokens) = (before, 0);
    while tokens < 1_000_000 {
        tokens += loader.next_step().unwrap().num_tokens();
        most = most.max(resident_mib());
    }
    assert!(most - before < 16.0, "{before} MiB grew to {most} MiB over {tokens} tokens");
    assert!(most < 128.0, "{most} MiB for a file of 128 MiB");
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1024.0
}
