//! Inspection of configurations and folders.

use std::time::Instant;

use mistral4_checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4_checkpoint::inspect::{inspect, of_config};
use mistral4_checkpoint::weights::{Checkpoint, StoredDType};

#[path = "../examples/sparse_checkpoint.rs"]
#[expect(dead_code, reason = "the example's own entry point is not used here")]
mod sparse_checkpoint;

#[test]
fn the_119b_preset_has_the_published_counts() {
    let file = ConfigFile::preset("mistral-small-4-119b", &ConfigOptions::default()).unwrap();
    let inspection = of_config(&file);
    // Counted over the parameters of transformers 5.24's Mistral3ForConditionalGeneration of the same configuration.
    assert_eq!(inspection.total_parameters, 119_401_298_944);
    assert_eq!(inspection.active_parameters, 6_524_189_696);
    let json = serde_json::to_value(&inspection).unwrap();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "model_type",
            "total_parameters",
            "active_parameters",
            "softmax_scale",
            "tensors",
            "dtypes",
            "layers",
            "experts",
            "warnings"
        ]
    );
    assert_eq!(json["softmax_scale"]["policy"], "standard");
    assert_eq!((&json["layers"], &json["experts"]), (&36.into(), &128.into()));
}

#[test]
fn a_119b_folder_of_holes_is_inspected_from_its_headers() {
    let folder = tempfile::tempdir().unwrap();
    sparse_checkpoint::write(folder.path(), "mistral-small-4-119b").unwrap();
    let start = Instant::now();
    let inspection = inspect(folder.path(), &ConfigOptions::default()).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert!(seconds < 2.0, "{seconds} s");
    assert_eq!(inspection.warnings, Vec::<String>::new());
    let billions = |dtype: &str| inspection.dtypes[dtype] / 1_000_000_000;
    assert_eq!((billions("F8_E4M3"), billions("BF16")), (117, 3));
    let checkpoint = Checkpoint::open(folder.path(), &ConfigOptions::default()).unwrap();
    let key = "language_model.model.layers.35.mlp.experts.down_proj";
    let view = checkpoint.view(key).unwrap().unwrap();
    assert_eq!((view.dtype, view.shape.as_slice()), (StoredDType::F8E4M3, [128, 4096, 2048].as_slice()));
    assert_eq!(view.scale.unwrap().values, [1.0; 128]);
}
