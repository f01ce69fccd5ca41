//! Training of Mistral 4: recipes, data, schedules, metrics and pictures of a run.

pub mod backward;
pub mod data;
mod error;
pub mod metrics;
pub mod plot;
pub mod quickstart;
pub mod recipe;
pub mod schedule;
pub mod trainer;
pub mod setup;
pub mod optim;

pub use error::{AcceptedNames, Blocker, Error, Location, Origin, Result};
