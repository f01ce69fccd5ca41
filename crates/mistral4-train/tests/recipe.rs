//! Recipes as people bring them, and recipes with mistakes.

use mistral4_train::Error;
use mistral4_train::parallel::MeshShape;
use mistral4_train::plan::Plan;
use mistral4_train::recipe::{
    DatasetConfig, Effect, LrDecayStyle, ModelSource, Override, PipelineConfig, Recipe, RecipeKind,
    SoftmaxScaleOverride, TorchDtype, parse_overrides,
};
use mistral4_train::schedule::{LrSchedule, StepScheduler};
use proptest::prelude::*;

const EXAMPLE: &str = include_str!("recipes/recipe-example.yaml");

fn parse_with(text: &str, overrides: &[Override]) -> Result<Recipe, Error> {
    Recipe::parse("r.yaml", text.as_bytes(), overrides, &|_| None)
}

fn parse(text: &str) -> Result<Recipe, Error> {
    parse_with(text, &[])
}

fn overrides(arguments: &[&str]) -> Vec<Override> {
    parse_overrides(&arguments.iter().map(|&argument| argument.to_owned()).collect::<Vec<_>>()).unwrap()
}

#[test]
fn the_example_recipe_runs_with_its_two_paths() {
    let recipe = parse_with(
        EXAMPLE,
        &overrides(&["--model.pretrained_model_name_or_path", "DIR", "--dataset.path_or_dataset=FILE"]),
    )
    .unwrap();
    recipe.check_runnable().unwrap();
    assert_eq!(recipe.kind, RecipeKind::NextTokenPrediction);
    assert_eq!(recipe.model.source, ModelSource::Pretrained("DIR".to_owned()));
    assert_eq!(recipe.model.torch_dtype, TorchDtype::Float32);
    assert_eq!(recipe.model.softmax_scale, Some(SoftmaxScaleOverride::Standard));
    assert_eq!(recipe.model.gate_bias_update_factor, 0.0);
    assert_eq!(
        recipe.dataset.source,
        DatasetConfig::PretokenizedJsonl { paths: vec!["FILE".into()], unshifted: true }
    );
    assert!(!recipe.dataloader.shuffle);
    assert_eq!((recipe.rng.seed, recipe.grad_acc_steps(), recipe.max_grad_norm), (1, 1, Some(1.0)));
    assert_eq!(recipe.packed_sequence, None);
    assert_eq!((recipe.optimizer.betas, recipe.optimizer.eps), ([0.9, 0.95], 1e-8));
    let scheduler = StepScheduler::new(&recipe.step_scheduler, Some(40), 1).unwrap();
    assert_eq!(scheduler.total_steps(), 30);
    let lr = LrSchedule::new(recipe.lr_scheduler.as_ref(), &recipe.optimizer, 30).unwrap();
    assert_eq!((lr.lr(0), lr.lr(5), lr.lr(29)), (1e-4, 1e-3, 1e-3));
    assert!((lr.lr(1) - 2.8e-4).abs() < 1e-12);
}

#[test]
fn nemo_medpix_parses_unchanged_and_says_what_is_missing() {
    let recipe = parse(include_str!("recipes/nemo/mistral4_medpix.yaml")).unwrap();
    assert_eq!(recipe.kind, RecipeKind::Vlm);
    assert!(recipe.model.multimodal);
    assert_eq!((recipe.step_scheduler.global_batch_size, recipe.grad_acc_steps()), (256, 64));
    assert!(recipe.freeze_config.freeze_embeddings && recipe.freeze_config.freeze_vision_tower);
    assert!(!recipe.freeze_config.freeze_language_model);
    assert_eq!((recipe.optimizer.eps, recipe.optimizer.lr), (1e-7, 1e-5));
    assert_eq!((recipe.dataloader.max_length, recipe.dataloader.drop_last), (Some(2048), true));
    assert_eq!((recipe.lr_scheduler.as_ref(), recipe.max_grad_norm), (None, None));
    assert_eq!(recipe.validation.len(), 1);
    recipe.check_runnable().unwrap();
    let missing = recipe.missing_data();
    let keys: Vec<_> = missing.iter().map(|missing| missing.key.as_str()).collect();
    assert_eq!(keys, ["dataset.path_or_dataset", "validation_dataset.path_or_dataset"]);
    let message = recipe.check_data_is_here().unwrap_err().to_string();
    assert!(message.contains("hf download --repo-type dataset mmoukouba/MedPix-VQA"), "{message}");
    assert!(message.contains("--validation_dataset.path_or_dataset DIR"), "{message}");
    assert!(recipe.describe_missing().contains("mistralai/Mistral-Small-4-119B-2603"));
    let plan = Plan::new(&recipe, MeshShape::fewest_ranks(&recipe.distributed)).unwrap();
    assert_eq!((plan.mesh.ranks(), plan.grad_acc_steps), (32, 8));
    assert!(plan.memory.is_some());
    assert_eq!((recipe.distributed.pp_size, recipe.distributed.ep_size), (4, 8));
    let pipeline = PipelineConfig { interleaved: true, layers_per_stage: Some(4) };
    assert_eq!(recipe.distributed.pipeline, pipeline);
    // 36 layers in runs of 4 are 9 stages, which are rounded down to 2 a rank.
    assert_eq!((pipeline.chunks(36, 4), PipelineConfig::default().chunks(36, 4)), (2, 1));
}

#[test]
fn nemo_lora_parses_unchanged() {
    let recipe = parse(include_str!("recipes/nemo/mistral4_lora.yaml")).unwrap();
    let peft = recipe.peft.as_ref().unwrap();
    let lora = &peft.lora;
    assert_eq!((lora.target_modules.as_slice(), lora.dim, lora.alpha), (&["*".to_owned()][..], 32, 32.0));
    assert!(lora.moe_rank_scaling && recipe.model.fake_balanced_gate);
    assert_eq!((peft.dropout, recipe.model.gate_bias_update_factor), (0.0, 0.0));
    assert!(recipe.distributed.activation_checkpointing);
    assert_eq!(
        recipe.model.source,
        ModelSource::FromConfig("mistralai/Mistral-Small-4-119B-2603".to_owned())
    );
    recipe.check_runnable().unwrap();
    assert!(recipe.missing_data().is_empty());
    let plan = Plan::new(&recipe, MeshShape::fewest_ranks(&recipe.distributed)).unwrap();
    let memory = plan.memory.unwrap();
    assert_eq!(plan.mesh.ranks(), 16);
    assert!(memory.gradients * 20 < memory.weights, "only adapters are trained: {memory:?}");
}

#[test]
fn other_nemo_recipes_parse_unchanged() {
    for (text, runs) in [
        (include_str!("recipes/nemo/llama3_2_1b_squad.yaml"), false),
        (include_str!("recipes/nemo/qwen3_moe_30b_te_chat_thd.yaml"), false),
        (include_str!("recipes/nemo/mistral_small_4_te_deepep.yaml"), true),
    ] {
        let recipe = parse(text).unwrap();
        assert_eq!(recipe.report.blockers().is_empty(), runs, "{:?}", recipe.report.blockers());
    }
}

/// Every key of a recipe is reported, so that none can be dropped in silence.
#[test]
fn every_key_is_reported() {
    for text in [
        EXAMPLE,
        include_str!("recipes/nemo/mistral4_medpix.yaml"),
        include_str!("recipes/nemo/mistral4_lora.yaml"),
    ] {
        let recipe = parse(text).unwrap();
        let reported: Vec<_> = recipe.report.entries.iter().map(|entry| entry.key.as_str()).collect();
        let written = recipe.to_yaml();
        let mut path: Vec<(usize, &str)> = Vec::new();
        for line in written.lines() {
            let Some((key, value)) = line.trim_start().split_once(':') else { continue };
            let indent = line.len() - line.trim_start().len();
            path.retain(|(depth, _)| *depth < indent);
            path.push((indent, key));
            if value.trim().is_empty() || value.trim() == "null" {
                continue;
            }
            let dotted = path.iter().map(|(_, key)| *key).collect::<Vec<_>>().join(".");
            let covered = reported.iter().any(|key| dotted == *key || dotted.starts_with(&format!("{key}.")));
            assert!(covered, "`{dotted}` is not in the report");
        }
    }
}

#[test]
fn the_report_groups_keys_by_what_they_do() {
    let recipe = parse(include_str!("recipes/nemo/llama3_2_1b_squad.yaml")).unwrap();
    let text = recipe.report.to_string();
    for part in
        ["honoured:", "without effect here:", "not supported:", "dist_env: {backend, timeout_minutes}"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(recipe.report.entries.iter().any(|entry| matches!(entry.effect, Effect::NoEffect(_))));
}

/// Every mistake with its message, to be read as a whole.
#[test]
fn mistakes_are_named_with_line_and_nearest_key() {
    const BASE: &str = "recipe: TrainFinetuneRecipeForNextTokenPrediction\n\
                        model: {pretrained_model_name_or_path: m}\n\
                        dataset: {_target_: pretokenized_jsonl, path_or_dataset: f}\n";
    parse(BASE).unwrap();
    let mut messages = String::new();
    for more in [
        "optimiser: {lr: 1}",
        "optimizer:\n  learning_rate: 1",
        "step_scheduler: {max_step: 3}",
        "step_scheduler: {max_steps: 0}",
        "step_scheduler: {max_steps: 1.5}",
        "step_scheduler: {local_batch_size: 3}",
        "step_scheduler: 3",
        "optimizer: {_target_: torch.optim.Adamw}",
        "optimizer: {_target_: os.system}",
        "optimizer: {_target_: ./mine.py:build}",
        "optimizer: {lr: fast}",
        "optimizer: {lr: -1}",
        "optimizer: {lr: .inf}",
        "optimizer: {betas: [0.9]}",
        "optimizer: {betas: [0.9, 1.0]}",
        "lr_scheduler: {lr_warmup_steps: 0.1}",
        "lr_scheduler: {lr_decay_style: cosin}",
        "clip_grad_norm: {max_norm: 0}",
        "seed: ${SEED}",
        "dataset: {}",
        "packed_sequence: {packed_sequence_size: -1}",
        "validation_dataset: {_target_: text, path_or_dataset: f}",
        "validation_datasets: {_target_: text, path_or_dataset: f}",
        "validation_dataset: {_target_: MockIterableDataset, num_samples: 1000000000000}",
        "validation_dataset: {_target_: optdigits, image_size: 4}",
        "validation_dataset: {_target_: ChatDataset, path_or_dataset_id: f, split: 'train[a:b]'}",
        "validation_dataset: {_target_: text, path_or_dataset: f, seq_length: 8, tokenizer: {_target_: learned}}",
        "validation_dataset: {_target_: text, path_or_dataset: f, seq_length: 8, tokenizer: other}",
        "dataloader: {collate_fn: my.collate}",
        "freeze_config: {freeze_embeddings: maybe}",
        "rng: {_target_: numpy.random.seed}",
        "loss_fn: {_target_: my.Loss}",
        "model: {pretrained_model_name_or_path: other}",
        "a: [1, 2",
        "a: {b: 1, b: 2}",
        "? [a]\n: 1",
        "a: &x [*x]",
        "- 1",
        "---\nrecipe: x",
        "a:\n\tb: 1",
    ] {
        let error = parse(&format!("{BASE}{more}\n")).err().unwrap_or_else(|| panic!("{more} was accepted"));
        messages.push_str(&format!("{more}\n    {error}\n"));
    }
    for (text, name) in [
        (&b""[..], "an empty file"),
        (b"\xff\xfe\x00", "bytes that are not UTF-8"),
        (b"recipe: FinetuneRecipeForVLM\n", "a recipe without a model"),
        (b"recipe: FinetuneRecipeForVLM\nmodel: {config: tiny}\n", "a recipe without data"),
        (b"model: {config: tiny}\n", "a recipe without a kind"),
        (
            b"recipe: {_target_: nemo_automodel.recipes.llm.kd.KnowledgeDistillation}\n",
            "a recipe of another kind",
        ),
    ] {
        let error = Recipe::parse("r.yaml", text, &[], &|_| None).unwrap_err();
        messages.push_str(&format!("({name})\n    {error}\n"));
    }
    insta::assert_snapshot!(messages);
}

#[test]
fn models_need_one_source() {
    let with = |model: &str| {
        parse(&format!(
            "recipe: FinetuneRecipeForVLM\nmodel: {{{model}}}\n\
             dataset: {{_target_: optdigits}}\n"
        ))
    };
    let from = "_target_: NeMoAutoModelForImageTextToText.from";
    assert_eq!(with("config: tiny").unwrap().model.source, ModelSource::FromConfig("tiny".to_owned()));
    assert_eq!(with("config: tiny").unwrap().model.gate_bias_update_factor, 1e-3);
    assert!(with(&format!("{from}_config, config: tiny")).unwrap().model.multimodal);
    assert!(with("config: tiny").unwrap().model.multimodal, "the kind of recipe says which model is meant");
    assert!(!with("_target_: NeMoAutoModelForCausalLM.from_config, config: tiny").unwrap().model.multimodal);
    for (model, want) in [
        ("", "the recipe needs `model.config`"),
        ("pretrained_model_name_or_path: a, config: b", "no `config` beside a checkpoint"),
        (&format!("{from}_config, pretrained_model_name_or_path: a"), "`config` in its place"),
        (&format!("{from}_pretrained, config: a"), "needs `model.pretrained_model_name_or_path`"),
        (
            "pretrained_model_name_or_path: a, softmax_scale: large",
            "`model.softmax_scale: large` is not one of",
        ),
    ] {
        let error = with(model).err().unwrap_or_else(|| panic!("{model} was accepted"));
        assert!(error.to_string().contains(want), "{model}\n{error}");
    }
}

#[test]
fn overrides_win_and_are_named_in_errors() {
    let paths = ["--model.pretrained_model_name_or_path", "m", "--dataset.path_or_dataset", "f"];
    let with = |more: &[&str]| parse_with(EXAMPLE, &overrides(&[&paths[..], more].concat()));
    let recipe = with(&[
        "--optimizer.betas",
        "(0.8, 0.9)",
        "--distributed.activation_checkpointing",
        "--lr_scheduler.lr_decay_style=WSD",
        "--lr_scheduler.wsd_decay_steps=5",
        "--packed_sequence.packed_sequence_size",
        "128",
    ])
    .unwrap();
    assert_eq!(recipe.optimizer.betas, [0.8, 0.9]);
    assert!(recipe.distributed.activation_checkpointing);
    assert_eq!(recipe.lr_scheduler.as_ref().unwrap().lr_decay_style, LrDecayStyle::Wsd);
    assert_eq!(recipe.packed_sequence.unwrap().packed_sequence_size, 128);
    let error = with(&["--optimizer.lrr", "1"]).unwrap_err().to_string();
    assert!(error.contains("r.yaml (override): unknown key `optimizer.lrr`; did you mean `lr`?"), "{error}");
    let error = with(&["--optimizer.lr", "fast"]).unwrap_err().to_string();
    assert!(error.contains("r.yaml (override): `optimizer.lr: fast`"), "{error}");
}

#[test]
fn secrets_are_neither_printed_nor_saved() {
    let text = format!("{EXAMPLE}wandb: {{api_key: hunter2, project: '${{PROJECT}}'}}\n");
    let variables = |name: &str| (name == "PROJECT").then(|| "expanded".to_owned());
    let recipe = Recipe::parse("r.yaml", text.as_bytes(), &[], &variables).unwrap();
    for shown in [recipe.to_yaml().to_owned(), recipe.report.to_string(), format!("{:?}", recipe.report)] {
        assert!(!shown.contains("hunter2") && !shown.contains("expanded"), "{shown}");
    }
    assert!(recipe.to_yaml().contains("${PROJECT}"));
    let error = parse(&format!("{EXAMPLE}wandb_api_key: hunter2\n")).unwrap_err();
    assert!(!error.to_string().contains("hunter2"));
}

#[test]
fn what_is_saved_reads_back_as_the_same_recipe() {
    let recipe = parse(EXAMPLE).unwrap();
    let again = parse(recipe.to_yaml()).unwrap();
    assert_eq!(recipe.to_yaml(), again.to_yaml());
    assert_eq!(recipe.optimizer, again.optimizer);
    assert_eq!(recipe.lr_scheduler, again.lr_scheduler);
}

proptest! {
    #[test]
    fn broken_recipes_never_panic(cut in 0usize..1400, at in 0usize..1400, byte in any::<u8>()) {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        bytes.truncate(cut.max(1));
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = Recipe::parse("r.yaml", &bytes, &[], &|_| None);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Recipe::parse("r.yaml", &bytes, &[], &|_| None);
    }
}
