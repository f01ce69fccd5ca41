//! Learns a vocabulary from a text file: `build_tekken TEXT VOCAB_SIZE OUT/tekken.json`.

use std::path::Path;
use std::process::ExitCode;

use mistral4_processor::tokenizer::{ImageConfig, TekkenBuilder};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [text, vocab_size, out] = arguments.as_slice() else {
        eprintln!("usage: build_tekken TEXT VOCAB_SIZE OUT/tekken.json");
        return ExitCode::from(2);
    };
    match build(text, vocab_size, Path::new(out)) {
        Ok(size) => {
            println!("{size} ids");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn build(text: &str, vocab_size: &str, out: &Path) -> Result<usize, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(text)?;
    let vocab_size = vocab_size.parse::<usize>()?.max(TekkenBuilder::MIN_VOCAB_SIZE);
    let image = ImageConfig { image_patch_size: 14, max_image_size: 1540, spatial_merge_size: 2 };
    let file = TekkenBuilder::new(vocab_size).image(image).train([text.as_str()])?;
    file.write(out)?;
    Ok(file.vocab_size())
}
