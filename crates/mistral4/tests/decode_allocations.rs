//! A generated token takes no memory once the first ones have: counted by the allocator, so in a program of its own.

#[path = "../../mistral4-kernels/tests/kernels/counting.rs"]
mod counting;

use burn::tensor::Device;
use counting::taken;
use mistral4::Mistral4;
use mistral4::generate::{Generation, Request, SamplingOptions};
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{InitialSource, ParameterSource, QuantizedSource};
use mistral4_checkpoint::config::{ConfigFile, ConfigOptions};
use mistral4_checkpoint::weights::{Bits, DType, WeightFormat, WeightQuantization};
use serde_json::json;

#[test]
fn generating_takes_no_memory() {
    /// So many times as many tokens are tried until none takes memory: each thread must have had every kind of task.
    const WINDOWS: usize = 30;
    const TOKENS: usize = 50;
    let raw = json!({
        "model_type": "mistral4", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 32,
        "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "max_position_embeddings": 4096, "tie_word_embeddings": false,
    });
    let config = ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config;
    let dense = InitialSource::new(&config, 11, DType::BF16);
    let int4 = WeightFormat::Int { bits: Bits::Four, group_size: 32, symmetric: true };
    let quantized =
        QuantizedSource::new(&dense, &config, WeightQuantization { weights: int4, lm_head: Some(int4) });
    for (name, source) in [("bf16", &dense as &dyn ParameterSource), ("int4", &quantized)] {
        let model = Mistral4::new(&config, MoeOptions::default(), source, &Device::flex()).unwrap().pack();
        let greedy = SamplingOptions { repetition_penalty: 1.1, ..Default::default() };
        let drawn = SamplingOptions { temperature: 0.8, top_p: 0.9, min_p: 0.01, ..greedy.clone() };
        for sampling in [greedy, drawn] {
            let request = Request {
                input_ids: vec![1, 2, 3, 4],
                images: None,
                sampling: sampling.clone(),
                max_new_tokens: 2 + WINDOWS * TOKENS,
                stop_tokens: vec![],
            };
            let mut generation = Generation::new(&model, vec![request]).unwrap();
            let mut taken_by = |tokens: usize| {
                let before = taken();
                (0..tokens).for_each(|_| assert_eq!(generation.step().unwrap().len(), 1));
                taken() - before
            };
            assert!(taken_by(2) > 0, "the prompt takes memory, and the allocator counts");
            assert!((0..WINDOWS).any(|_| taken_by(TOKENS) == 0), "{name} {sampling:?}");
        }
    }
}
