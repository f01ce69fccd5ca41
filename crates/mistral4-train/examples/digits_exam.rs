//! Asks a model about every held-out digit: how many answers are right?
//!
//! cargo run --release -p mistral4-train --example digits_exam -- MODEL_DIR [--adapter DIR] [--task name|next]

use std::path::PathBuf;

use burn::tensor::Device;
use mistral4::Mistral4;
use mistral4::model::moe::MoeOptions;
use mistral4::weights::{AdaptedSource, CheckpointSource};
use mistral4_checkpoint::adapter::Adapter;
use mistral4_checkpoint::config::ConfigOptions;
use mistral4_checkpoint::weights::{Checkpoint, DType};
use mistral4_processor::Processor;
use mistral4_train::data::optdigits::OptDigits;
use mistral4_train::quickstart::Exam;
use mistral4_train::recipe::DigitsTask;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let usage = "usage: digits_exam MODEL_DIR [--adapter DIR] [--task name|next]";
    let (mut folder, mut adapter, mut task) = (None, None, DigitsTask::Name);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--adapter" => adapter = Some(PathBuf::from(arguments.next().ok_or(usage)?)),
            "--task" => {
                task = match arguments.next().as_deref() {
                    Some("name") => DigitsTask::Name,
                    Some("next") => DigitsTask::Next,
                    _ => return Err(usage.into()),
                }
            }
            _ if folder.is_none() => folder = Some(PathBuf::from(argument)),
            _ => return Err(usage.into()),
        }
    }
    let folder = folder.ok_or(usage)?;
    let checkpoint = Checkpoint::open(&folder, &ConfigOptions::default())?;
    checkpoint.check(&checkpoint.tensors())?;
    let adapter = adapter.map(|folder| Adapter::open(&folder, checkpoint.config())).transpose()?;
    let (device, moe) = (Device::flex(), MoeOptions::default());
    let base = CheckpointSource { checkpoint: &checkpoint, dtype: DType::F32 };
    let model = match &adapter {
        Some(adapter) => {
            Mistral4::new(checkpoint.config(), moe, &AdaptedSource::new(&base, adapter), &device)?
        }
        None => Mistral4::new(checkpoint.config(), moe, &base, &device)?,
    };
    let (digits, processor) = (OptDigits::load(), Processor::from_dir(&folder)?);
    let exam = Exam { digits: &digits, task, side: 32 };
    let ((correct, all), answers) = exam.take(&model, &processor, &device)?;
    for (index, answer) in answers.iter().take(5).enumerate() {
        println!(
            "{} -> {answer}",
            task.question(digits.split(mistral4_train::recipe::Split::Validation).start + index)
        );
    }
    println!("{correct} of {all} right ({:.1} %)", 100.0 * correct as f64 / all as f64);
    Ok(())
}
