//! Opens the data as a run would, and goes through it.

use mistral4_train::data::{
    self, Batch, BatchLayout, DataContext, DataRank, IGNORE_INDEX, Loader, LoaderOptions,
};
use mistral4_train::recipe::{DatasetSection, Override, Recipe, parse_overrides};
use mistral4_train::setup;
use serde_json::json;

use super::InspectArguments;
use super::page::{self, Sequence};
use super::statistics::Statistics;
use crate::error::{Error, Result};
use crate::stdout;

/// What the rest of a recipe would be, for data without one.
const BARE: &str = "recipe: TrainFinetuneRecipeForNextTokenPrediction\nmodel: {}\ndataset: {}\n";
/// Tokens of a piece of text, unless `--set dataset.seq_length` says otherwise.
const TEXT_LENGTH: &str = "2048";

/// Runs the command.
///
/// # Errors
/// A recipe, tokenizer or data file that cannot be used.
pub(super) fn run(arguments: &InspectArguments) -> Result<()> {
    let recipe = recipe(arguments)?;
    let section = section(&recipe, arguments)?;
    let context = setup::data_context(&recipe)?;
    let mut options = match arguments.validation {
        None => LoaderOptions::training(&recipe, 0),
        Some(_) => LoaderOptions::validation(&recipe, section, 0),
    };
    // A row at a time, so that nothing is padded.
    (options.global_batch_size, options.local_batch_size) = (1, 1);
    options.shuffle = arguments.shuffle;
    let row_size = options.packing.map(|packing| packing.packed_sequence_size);
    let mut loader = Loader::new(data::open(section, &context)?, options, DataRank::SINGLE)?;

    let mut statistics = Statistics::new(row_size, arguments.count);
    let mut shown = Vec::new();
    while !statistics.is_complete() && (shown.len() < arguments.rows || !statistics.is_enough()) {
        let step = loader.next_step()?;
        for batch in step.batches.into_iter().filter(|batch| batch.num_tokens > 0) {
            let sequences = sequences(&batch, &context);
            statistics.add(&batch, &sequences);
            if shown.len() < arguments.rows {
                shown.push(sequences);
            }
        }
        statistics.end(step.ends_epoch);
    }
    let total = loader.num_samples();
    if arguments.json {
        let rows: Vec<_> = shown.iter().flatten().map(|sequence| sequence.to_json(&context)).collect();
        let mut object = statistics.to_json(total, loader.skipped());
        object["samples"] = json!(rows);
        return stdout::print_json(&object);
    }
    let is_coloured = !arguments.no_color && stdout::is_styled();
    let mut text = String::new();
    for (row, sequences) in shown.iter().enumerate() {
        text.push_str(&page::row(row, sequences, row_size, &context, is_coloured));
    }
    text.push_str(&statistics.to_text(total, loader.skipped()));
    stdout::print(&text)
}

fn recipe(arguments: &InspectArguments) -> Result<Recipe> {
    let mut overrides = Vec::new();
    for setting in &arguments.set {
        if !setting.contains('=') {
            return Err(Error::input(format!("--set {setting}: there is no value"), "write --set KEY=VALUE"));
        }
        overrides.extend(parse_overrides(&[format!("--{setting}")])?);
    }
    let Some(path) = &arguments.recipe else {
        let target = match &arguments.target {
            Some(target) => target.clone(),
            None => data::guess_target(&arguments.data)?.to_owned(),
        };
        let set = |key: &str, value: &str| Override { key: key.to_owned(), value: value.to_owned() };
        let paths = serde_json::to_string(&arguments.data).unwrap_or_default();
        let mut all = vec![set("dataset._target_", &target), set("dataset.path_or_dataset", &paths)];
        if target == "text" {
            all.push(set("dataset.seq_length", TEXT_LENGTH));
        }
        let model = arguments.model.as_deref().unwrap_or_default();
        all.push(set("model.pretrained_model_name_or_path", model));
        all.extend(overrides);
        let variables = |name: &str| std::env::var(name).ok();
        return Ok(Recipe::parse("(no recipe)", BARE.as_bytes(), &all, &variables)?);
    };
    Ok(Recipe::load(path, &overrides)?)
}

fn section<'r>(recipe: &'r Recipe, arguments: &InspectArguments) -> Result<&'r DatasetSection> {
    let Some(name) = &arguments.validation else { return Ok(&recipe.dataset) };
    match recipe.validation.iter().find(|set| set.name == *name) {
        Some(set) => Ok(&set.dataset),
        None => {
            let names: Vec<&str> = recipe.validation.iter().map(|set| set.name.as_str()).collect();
            let message = format!("the recipe has no held-out set `{name}`");
            Err(Error::input(message, format!("its held-out sets: {}", names.join(", "))))
        }
    }
}

/// The samples of a batch.
fn sequences(batch: &Batch, context: &DataContext) -> Vec<Sequence> {
    let bounds: Vec<usize> = match &batch.layout {
        BatchLayout::Packed { cu_seqlens } => cu_seqlens.clone(),
        BatchLayout::Rows { batch, sequence } => (0..=*batch).map(|row| row * sequence).collect(),
    };
    let mut images = batch.images.iter();
    let sequence = |(bounds, &row): (&[usize], &usize)| {
        let (ids, labels) = (&batch.input_ids[bounds[0]..bounds[1]], &batch.labels[bounds[0]..bounds[1]]);
        let is_learned = |&label: &i64| label != IGNORE_INDEX;
        let mut learned = vec![false];
        learned.extend(labels.iter().map(is_learned));
        let mut tokens = ids.to_vec();
        match labels.last().copied().filter(is_learned) {
            Some(last) => tokens.push(last as u32),
            None => learned.truncate(tokens.len()),
        }
        let count = page::count_images(&tokens, context);
        let images = images.by_ref().take(count).map(|image| [image.height, image.width]).collect();
        let next = ids.iter().skip(1).zip(labels);
        let other = next.filter(|&(&id, label)| is_learned(label) && *label != i64::from(id)).count();
        Sequence { row, tokens, learned, images, labels: labels.to_vec(), other_labels: other }
    };
    bounds.windows(2).zip(&batch.rows).map(sequence).collect()
}
