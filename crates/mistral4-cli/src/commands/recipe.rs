//! `mistral4 recipe`: what a recipe may hold.

use clap::{Args, Subcommand};

use crate::error::{Error, Result};
use crate::stdout;

/// Arguments of `mistral4 recipe`.
#[derive(Debug, Args)]
pub struct RecipeArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: RecipeCommand,
}

/// What can be done with recipes.
#[derive(Debug, Clone, Copy, Subcommand)]
pub enum RecipeCommand {
    /// Print the JSON schema of recipes, for editors that check and complete YAML
    Schema,
}

/// Runs the command.
///
/// # Errors
/// Standard output that cannot be written.
pub fn run(arguments: &RecipeArguments) -> Result<()> {
    match arguments.command {
        RecipeCommand::Schema => {
            let schema = serde_json::to_string_pretty(&mistral4_train::recipe::json_schema());
            let schema = schema.map_err(|error| {
                Error::failed(format!("cannot write JSON: {error}"), "this is a defect; please report it")
            })?;
            stdout::print(&format!("{schema}\n"))
        }
    }
}
