//! Checkpoints that a run cannot go on from.

use mistral4_train::Error;

use crate::place::{Place, config, lines};

#[test]
fn a_checkpoint_of_another_run_is_refused_by_what_differs() {
    let place = Place::new();
    let few = ("step_scheduler.max_steps", "5");
    place.train("run", &[few]).unwrap();
    let other = place.path("other.json");
    let mut config = config();
    config["moe_intermediate_size"] = 12.into();
    std::fs::write(&other, config.to_string()).unwrap();
    for (key, value, differs) in [
        ("model.config", other.to_str().unwrap(), "moe_intermediate_size was 8, is 12"),
        ("model.torch_dtype", "bfloat16", "model.torch_dtype was float32, is bfloat16"),
        ("rng.seed", "6", "rng.seed was 5, is 6"),
        ("dataset.num_samples", "27", "number of samples was 26, is 27"),
        ("packed_sequence.packed_sequence_size", "64", "packed_sequence_size was 0, is 64"),
    ] {
        let error = place.train("run", &[few, (key, value)]).err().unwrap();
        assert!(matches!(*error, Error::Incompatible { .. }), "{error}");
        assert!(error.to_string().contains(differs), "{error}");
    }
    assert_eq!(lines(&place.path("run/training.jsonl")).len(), 5);
}

#[test]
fn a_damaged_checkpoint_is_refused_by_file() {
    let place = Place::new();
    let few = [("step_scheduler.max_steps", "5")];
    let checkpoint = place.train("run", &few).unwrap().checkpoint.unwrap();
    for name in ["optim/exp_avg.safetensors", "trainer.json", "dataloader/dataloader_dp_rank_0.json"] {
        let path = checkpoint.join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = place.train("run", &few).err().unwrap();
        assert!(matches!(&*error, Error::Damaged { path: named, .. } if named == &path), "{error}");
        std::fs::write(&path, whole).unwrap();
    }
    place.train("run", &few).unwrap();
}
