//! `mistral4 forward`: one pass over tensors of a file, for comparing implementations.

mod grads;
mod greedy;
mod inputs;
mod loss;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::Tensor;
use clap::Args;
use mistral4::inputs::Layout;
use mistral4::{ForwardOptions, Mistral4};
use mistral4_checkpoint::adapter::Adapter;
use serde::Serialize;

use self::inputs::Inputs;
use crate::arguments::{FloatDType, ModelArguments};
use crate::error::{Error, Result};
use crate::load::{self, Weights, model_folder, open_checkpoint};
use crate::tensors::NamedArray;
use crate::{format, stdout, tensors};

/// Arguments of `mistral4 forward`.
#[derive(Debug, Args)]
#[command(after_help = "\
Inputs: input_ids i64 [B,S]; optional attention_mask, position_ids, labels i64 [B,S] (-100: ignored; not shifted),
pixel_values f32 [images,3,H,W] with image_sizes i64 [images,2] (height, width).
Packed: input_ids i64 [T] with cu_seqlens i64 [sequences+1]; position_ids, labels i64 [T].
Outputs: logits f32 [B,S,V] (or [T,V]), and what the flags and labels ask for.")]
pub struct ForwardArguments {
    /// The model.
    #[command(flatten)]
    pub model: ModelArguments,
    /// Number format of the weights and activations
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: FloatDType,
    /// safetensors file with the inputs
    #[arg(long, value_name = "IN.safetensors")]
    pub inputs: PathBuf,
    /// safetensors file to write
    #[arg(long, value_name = "OUT.safetensors")]
    pub outputs: PathBuf,
    /// Also write `hidden_states.0` (the first layer's input) to `hidden_states.N` (after the final norm)
    #[arg(long)]
    pub hidden_states: bool,
    /// Also write `grad.<key>` of the mean loss for every parameter (with --adapter, of the adapter); needs labels
    #[arg(long)]
    pub grads: bool,
    /// Also write `greedy` i64 `[B,N]`: each row continued by the likeliest tokens, N of them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub greedy: Option<u32>,
    /// Print a JSON object on standard output
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Summary<'a> {
    outputs: &'a PathBuf,
    tensors: BTreeMap<&'a str, &'a [usize]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loss: Option<f32>,
    softmax_scale: f64,
    dtype: &'static str,
    device: String,
    seconds: f64,
}

/// Runs the command.
///
/// # Errors
/// Inputs that are malformed or do not fit the model; a file that cannot be written.
pub fn run(arguments: &ForwardArguments) -> Result<()> {
    let begin = Instant::now();
    let (arrays, softmax_scale) = compute(arguments)?;
    tensors::write(&arguments.outputs, &arrays)?;
    let loss = arrays.iter().find(|array| array.name == "loss").map(|array| match &array.values {
        tensors::Values::F32(values) => values[0],
        tensors::Values::I64(_) => unreachable!("the loss is a float"),
    });
    let seconds = begin.elapsed().as_secs_f64();
    if arguments.json {
        return stdout::print_json(&Summary {
            outputs: &arguments.outputs,
            tensors: arrays.iter().map(|array| (array.name.as_str(), array.shape.as_slice())).collect(),
            loss,
            softmax_scale,
            dtype: arguments.dtype.name(),
            device: arguments.model.compute.device.to_string(),
            seconds,
        });
    }
    let loss = loss.map(|loss| format!(", loss {loss}")).unwrap_or_default();
    stdout::print(&format!(
        "wrote {} tensors to {} in {}{loss}\n",
        arrays.len(),
        arguments.outputs.display(),
        format::seconds(seconds)
    ))
}

/// Everything that the command writes, and the softmax scale in use.
///
/// # Errors
/// Inputs that are malformed or do not fit the model.
pub fn compute(arguments: &ForwardArguments) -> Result<(Vec<NamedArray>, f64)> {
    let quantization = arguments.model.quantize.resolve()?;
    if arguments.grads && quantization.is_some() {
        return Err(Error::input(
            "--grads needs every weight, and quantised weights have no gradients",
            "leave out --quantize or --grads",
        ));
    }
    let weights = if arguments.grads { Weights::Dense } else { Weights::from(quantization) };
    let device = arguments.model.compute.device.open()?;
    let folder = model_folder(&arguments.model.model)?;
    let checkpoint = open_checkpoint(&folder, &arguments.model.config_options())?;
    let inputs = Inputs::read(&arguments.inputs, checkpoint.config())?;
    if arguments.grads && inputs.labels.is_none() {
        return Err(Error::input(
            format!("--grads needs a loss, and {} holds no `labels`", arguments.inputs.display()),
            "add `labels` i64 of the shape of `input_ids`, -100 where there is none",
        ));
    }
    let adapter = arguments.model.adapter.as_ref();
    let adapter = adapter.map(|folder| Adapter::open(folder, checkpoint.config())).transpose()?;
    let model = load::build(&checkpoint, adapter.as_ref(), arguments.dtype.dtype(), weights, &device)?;
    let model = if arguments.grads { model } else { model.pack() };
    let mut arrays = forward(&model, &inputs, arguments.hidden_states, &device)?;
    if let Some(labels) = inputs.labels.as_ref().filter(|_| arguments.grads) {
        let of_parameters = grads::gradients(&model, &inputs, labels, &device)?;
        arrays.extend(match &adapter {
            Some(adapter) => grads::of_adapter(of_parameters, adapter, checkpoint.config()),
            None => grads::of_checkpoint(of_parameters, &checkpoint),
        });
    }
    if let Some(count) = arguments.greedy {
        let tokens = greedy::continue_rows(&model, &inputs, count as usize, &device)?;
        let rows = tokens.len() / count as usize;
        arrays.push(NamedArray::i64("greedy", [rows, count as usize], tokens));
    }
    Ok((arrays, checkpoint.config().softmax_scale.value))
}

/// Logits, loss and hidden states.
fn forward(
    model: &Mistral4,
    inputs: &Inputs,
    hidden_states: bool,
    device: &burn::tensor::Device,
) -> Result<Vec<NamedArray>> {
    let options = ForwardOptions { output_hidden_states: hidden_states, ..Default::default() };
    let output = model.forward(&inputs.model_inputs(device), None, &options)?;
    let logits = floats(output.logits.expect("all logits were asked for"));
    let vocab = model.text().vocab_size();
    let mut arrays = Vec::new();
    if let Some(labels) = &inputs.labels {
        let loss = loss::mean_cross_entropy(&logits, vocab, &inputs.targets(labels));
        arrays.push(NamedArray::f32("loss", [], vec![loss]));
    }
    arrays.push(NamedArray::f32("logits", shaped(&inputs.layout, vocab), logits));
    for (index, state) in output.hidden_states.into_iter().enumerate() {
        let width = state.dims()[1];
        let name = format!("hidden_states.{index}");
        arrays.push(NamedArray::f32(name, shaped(&inputs.layout, width), floats(state)));
    }
    Ok(arrays)
}

/// `[B, S, width]`, or `[T, width]` when packed.
fn shaped(layout: &Layout, width: usize) -> Vec<usize> {
    match layout {
        Layout::Rows { batch, sequence } => vec![*batch, *sequence, width],
        packed => vec![packed.tokens(), width],
    }
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_as::<f32>().try_into_vec::<f32>().expect("the tensor was just converted to f32")
}
