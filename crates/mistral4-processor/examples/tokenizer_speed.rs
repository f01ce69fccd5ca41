//! Times loading a tokenizer and encoding a text file: `tokenizer_speed TOKENIZER TEXT`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use mistral4_processor::Tokenizer;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, text] = arguments.as_slice() else {
        eprintln!("usage: tokenizer_speed TOKENIZER TEXT");
        return ExitCode::from(2);
    };
    match measure(Path::new(tokenizer), Path::new(text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(tokenizer: &Path, text: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(text)?;
    let start = Instant::now();
    let tokenizer = Tokenizer::from_file(tokenizer)?;
    println!("load {:.3} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let ids = tokenizer.encode(&text)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "encode {} bytes to {} ids in {seconds:.3} s, {:.1} MB/s",
        text.len(),
        ids.len(),
        text.len() as f64 / seconds / 1e6
    );
    Ok(())
}
