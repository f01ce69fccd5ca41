//! Loads one decoder layer of a checkpoint, of any size and dtype, and runs it.
//!
//! ```text
//! cargo run --release -p mistral4 --example decoder_layer -- FOLDER [LAYER] [TOKENS]
//! ```
//!
//! Shows that a layer of the released 119B model (128 experts, FP8) loads and runs on a machine that could never hold the
//! whole; the folder may be one of sparse files (`--example sparse_checkpoint` of mistral4-checkpoint).

use std::path::Path;
use std::time::Instant;

use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4::checkpoint::config::ConfigOptions;
use mistral4::checkpoint::weights::{Checkpoint, DType as StorageType};
use mistral4::inputs::ModelInputs;
use mistral4::model::decoder_layer::{DecoderLayer, LayerContext};
use mistral4::model::mla::AttentionMask;
use mistral4::model::moe::MoeOptions;
use mistral4::model::rope::RotaryEmbedding;
use mistral4::weights::{CheckpointSource, Parameters, named_parameters};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: decoder_layer FOLDER [LAYER] [TOKENS]")?;
    let index: usize = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let tokens: usize = arguments.next().map_or(Ok(64), |text| text.parse())?;

    let device = Device::flex();
    let checkpoint = Checkpoint::open(Path::new(&folder), &ConfigOptions::default())?;
    let config = checkpoint.config().clone();
    let prefix = if config.vision.is_some() { "language_model.model" } else { "model" };
    let source = CheckpointSource { checkpoint: &checkpoint, dtype: StorageType::BF16 };
    let parameters = Parameters::new(&source, &device).pp(prefix).pp("layers").pp(index);

    let started = Instant::now();
    let layer = DecoderLayer::new(&config, MoeOptions::default(), index, &parameters)?;
    let values: usize = named_parameters(&layer).iter().map(|p| p.values.dims()[0]).sum();
    println!("layer {index}: {values} parameters read as bf16 in {:.1} s", started.elapsed().as_secs_f64());

    let hidden = config.text.hidden_size;
    let wave = |i: usize| half::bf16::from_f32((i as f32 * 0.37).sin());
    let x: Vec<half::bf16> = (0..tokens * hidden).map(wave).collect();
    let x = Tensor::<2>::from_data(TensorData::new(x, [tokens, hidden]), (&device, DType::BF16));
    let positions: Vec<i64> = (0..tokens as i64).collect();
    let inputs =
        ModelInputs::embeddings(x.clone(), mistral4::inputs::Layout::Rows { batch: 1, sequence: tokens });
    inputs.check(config.text.vocab_size)?;
    let segments = vec![mistral4::ops::Segment { q: 0..tokens, k: 0..tokens, causal: Some(0) }];
    let context = LayerContext {
        rotary: RotaryEmbedding::new(&config.text).tables(&positions, &device),
        mask: AttentionMask::Segments(segments.into()),
        token_mask: None,
        output_routing: false,
    };
    for pass in ["first", "second"] {
        let started = Instant::now();
        let (y, routing) = layer.forward(x.clone(), &context, None, None);
        let values: Vec<f32> = y.into_data_as::<f32>().try_into_vec()?;
        let norm = values.iter().map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        let used = routing.map_or(0, |r| r.load.iter().filter(|&&l| l > 0).count());
        println!(
            "{pass} pass of {tokens} tokens: {:.2} s, {used} experts used, norm of the output {norm:.4}",
            started.elapsed().as_secs_f64()
        );
        if !norm.is_finite() {
            return Err("the output is not finite".into());
        }
    }
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        status
            .lines()
            .filter(|line| line.starts_with("VmHWM"))
            .for_each(|line| println!("peak memory {}", &line[6..]));
    }
    Ok(())
}
