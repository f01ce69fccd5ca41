//! Training of Mistral 4: recipes, data, schedules, metrics and pictures of a run.

pub mod data;
mod error;
pub mod metrics;
pub mod plot;
pub mod recipe;
pub mod schedule;

pub use error::{AcceptedNames, Blocker, Error, Location, Origin, Result};
