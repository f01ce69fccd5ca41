//! The JSON schema of recipes against recipes.

use std::path::{Path, PathBuf};

use mistral4_train::recipe::{Recipe, json_schema, to_json};
use serde_json::{Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn recipes() -> Vec<(String, Vec<u8>)> {
    let folders = [root().join("recipes"), root().join("crates/mistral4-train/tests/recipes")];
    let folders = folders.into_iter().chain([root().join("crates/mistral4-train/tests/recipes/nemo")]);
    let files =
        folders.flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    files.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect()
}

#[test]
fn every_recipe_fits_the_schema() {
    let schema = json_schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let recipes = recipes();
    assert!(recipes.len() >= 7);
    for (name, bytes) in recipes {
        let json = to_json(&name, &bytes).unwrap();
        let errors: Vec<String> =
            validator.iter_errors(&json).map(|error| format!("{}: {error}", error.instance_path())).collect();
        assert!(errors.is_empty(), "{name}: {errors:#?}");
    }
}

/// Recipes that the reader refuses for a key or a value; the schema must refuse the same.
#[test]
fn wrong_recipes_do_not_fit() {
    let schema = json_schema();
    let validator = jsonschema::validator_for(&schema).unwrap();
    const BASE: &str = "recipe: TrainFinetuneRecipeForNextTokenPrediction\n\
                        model: {pretrained_model_name_or_path: m}\n\
                        dataset: {_target_: pretokenized_jsonl, path_or_dataset: f}\n";
    let fits = |text: &str| validator.is_valid(&to_json("r.yaml", text.as_bytes()).unwrap());
    let reads = |text: &str| Recipe::parse("r.yaml", text.as_bytes(), &[], &|_| None).is_ok();
    assert!(fits(BASE) && reads(BASE));
    for more in [
        "optimiser: {lr: 1}",
        "optimizer: {learning_rate: 1}",
        "optimizer: {_target_: os.system}",
        "optimizer: {lr: fast}",
        "optimizer: {lr: -1}",
        "optimizer: {betas: [0.9]}",
        "optimizer: {betas: [0.9, 1.0]}",
        "step_scheduler: {max_step: 3}",
        "step_scheduler: {max_steps: 0}",
        "step_scheduler: {max_steps: 1.5}",
        "step_scheduler: 3",
        "lr_scheduler: {lr_decay_style: cosin}",
        "validation_datasets: {_target_: text, path_or_dataset: f, seq_length: 8}",
        "validation_dataset: {path_or_dataset: f}",
        "validation_dataset: {_target_: text, path_or_dataset: f}",
        "validation_dataset: {_target_: text, path_or_dataset: f, seq_length: 8, mask_history: true}",
        "validation_dataset: {_target_: text, path_or_dataset: f, seq_length: 8, split: 'train[1:]'}",
        "validation_dataset: {_target_: text, path_or_dataset: f, seq_length: 8, tokenizer: {_target_: learned}}",
        "validation_dataset_other: {_target_: optdigits, seq_length: 8}",
        "validation_dataset: {_target_: ColumnMappedTextInstructionDataset, path_or_dataset: f, column_mapping: {question: a}}",
        "dataloader: {collate_fn: my.collate}",
        "dataloader: {num_workers: 1000000}",
        "dataloader: {collate_fn: {_target_: default_collater, lenght: 8}}",
        "freeze_config: {freeze_embeddings: maybe}",
        "checkpoint: {enabled: 3}",
    ] {
        let text = format!("{BASE}{more}\n");
        assert!(!reads(&text), "the reader takes {more}");
        assert!(!fits(&text), "the schema takes {more}");
    }
    for missing in ["recipe", "model", "dataset"] {
        let text: String =
            BASE.lines().filter(|line| !line.starts_with(missing)).map(|l| format!("{l}\n")).collect();
        assert!(!fits(&text), "the schema takes a recipe without {missing}");
    }
    for more in [
        "validation_dataset_other: {_target_: text, path_or_dataset: [f, g], seq_length: 8, split: validation}",
        "validation_dataset: {_target_: ChatDataset, path_or_dataset_id: f, split: 'train[1:]', truncation: true}",
        "optimizer: {lr: '${LR,1e-3}', betas: [0.9, '${BETA,0.95}']}",
        "step_scheduler: {ckpt_every_steps: null}",
        "wandb: {enable: true, project: p}",
        "rng: {_target_: StatefulRNG, seed: 3}",
    ] {
        let text = format!("{BASE}{more}\n");
        assert!(reads(&text) && fits(&text), "{more}");
    }
}

/// The description of a key somewhere in a section.
fn description(schema: &Value, key: &str) -> Option<String> {
    match schema {
        Value::Object(entries) => match schema["properties"][key]["description"].as_str() {
            Some(text) => Some(text.to_owned()),
            None => entries.values().find_map(|value| description(value, key)),
        },
        Value::Array(items) => items.iter().find_map(|item| description(item, key)),
        _ => None,
    }
}

#[test]
fn keys_are_described() {
    let schema = json_schema();
    for (section, key, what) in [
        ("optimizer", "lr", "learning rate"),
        ("step_scheduler", "max_steps", "training ends"),
        ("dataloader", "num_workers", "threads"),
    ] {
        let found = description(&schema["properties"][section], key).unwrap_or_default();
        assert!(found.contains(what), "{section}.{key}: {found}");
    }
    assert_eq!(schema["required"], json!(["dataset", "model", "recipe"]));
}

#[test]
fn the_published_schema_is_current() {
    let path = root().join("docs/recipe.schema.json");
    let published: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert!(
        published == json_schema(),
        "docs/recipe.schema.json is out of date; write it anew with `mistral4 recipe schema > docs/recipe.schema.json`"
    );
}
