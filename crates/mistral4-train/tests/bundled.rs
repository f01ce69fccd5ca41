//! The recipes of this repository, up to their batches.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mistral4_processor::Processor;
use mistral4_processor::image::ImageProcessor;
use mistral4_processor::tokenizer::ImageConfig;
use mistral4_train::data::{self, DataContext, DataRank, Loader, LoaderOptions};
use mistral4_train::recipe::{DatasetConfig, ModelSource, Recipe, TokenizerSource};
use mistral4_train::schedule::{LrSchedule, StepScheduler};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The recipe with its paths made to begin at the repository's root.
fn recipe(name: &str) -> Recipe {
    let mut recipe = Recipe::load(&root().join("recipes").join(name), &[]).unwrap();
    let sections = recipe.validation.iter_mut().map(|set| &mut set.dataset).chain([&mut recipe.dataset]);
    for section in sections {
        if let DatasetConfig::Text(config) = &mut section.source {
            config.paths.iter_mut().for_each(|path| *path = root().join(&path));
        }
    }
    recipe
}

/// Opens training and validation data with the learned tokenizer, and returns them with their loaders' step counts.
fn open(recipe: &Recipe) -> (Loader, Loader) {
    let ModelSource::FromConfig(config) = &recipe.model.source else { panic!("from scratch") };
    let text = std::fs::read_to_string(root().join(config)).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vision = config.get("vision_config").map(|vision| ImageConfig {
        image_patch_size: vision["patch_size"].as_u64().unwrap() as usize,
        max_image_size: vision["image_size"].as_u64().unwrap() as usize,
        spatial_merge_size: config["spatial_merge_size"].as_u64().unwrap() as usize,
    });
    let TokenizerSource::Learned { vocab_size } = recipe.dataset.tokenizer else { panic!("learned") };
    let file = data::learn_tokenizer(&recipe.dataset, vocab_size, vision).unwrap();
    let table = config.get("text_config").unwrap_or(&config)["vocab_size"].as_u64().unwrap() as usize;
    assert!(file.vocab_size() <= table, "{} ids for a table of {table}", file.vocab_size());
    let images = vision.map(|image| ImageProcessor::new(image.into()));
    let processor = Some(Arc::new(Processor::new(file.tokenizer().unwrap(), images)));
    let context = DataContext { processor, vocab_size: table, seed: recipe.rng.seed };
    let held_out = &recipe.validation[0].dataset;
    let training = data::open(&recipe.dataset, &context).unwrap();
    let validation = data::open(held_out, &context).unwrap();
    (
        Loader::new(training, LoaderOptions::training(recipe, 11), DataRank::SINGLE).unwrap(),
        Loader::new(validation, LoaderOptions::validation(recipe, held_out, 11), DataRank::SINGLE).unwrap(),
    )
}

fn check(name: &str) -> (Recipe, Loader, Loader) {
    let recipe = recipe(name);
    recipe.check_runnable().unwrap();
    let (mut training, mut validation) = open(&recipe);
    let scheduler = StepScheduler::new(&recipe.step_scheduler, training.steps_per_epoch(), 1).unwrap();
    LrSchedule::new(recipe.lr_scheduler.as_ref(), &recipe.optimizer, scheduler.total_steps()).unwrap();
    assert_eq!(scheduler.total_steps(), recipe.step_scheduler.max_steps.unwrap());
    let step = training.next_step().unwrap();
    assert_eq!(step.batches.len(), scheduler.grad_acc_steps());
    assert!(step.num_label_tokens() > 0 && validation.next_step().unwrap().num_label_tokens() > 0);
    (recipe, training, validation)
}

#[test]
fn digits_recipe_makes_batches() {
    let (recipe, training, validation) = check("digits_vlm.yaml");
    assert!(recipe.model.multimodal);
    assert_eq!((training.num_samples().unwrap() % 1437, validation.num_samples()), (0, Some(360)));
}

#[test]
fn text_recipe_makes_batches() {
    let (_, mut training, mut validation) = check("text_pretrain_tiny.yaml");
    for (loader, least) in [(&mut training, 500), (&mut validation, 20)] {
        loader.restart();
        let mut samples = 0;
        loop {
            let step = loader.next_step().unwrap();
            samples += step.batches.iter().map(|batch| batch.rows.len()).sum::<usize>();
            if step.ends_epoch {
                break;
            }
        }
        assert!(samples > least, "{samples}");
    }
}

#[test]
fn every_recipe_parses_and_can_run() {
    let mut seen = 0;
    for entry in std::fs::read_dir(root().join("recipes")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            Recipe::load(&path, &[]).unwrap().check_runnable().unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 2);
}
