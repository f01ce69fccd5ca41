//! Training of Mistral 4: recipes, data, schedules, metrics and pictures of a run.

pub mod backward;
pub mod checkpoint;
pub mod dashboard;
pub mod data;
mod early_stop;
mod error;
mod guard;
pub mod metrics;
pub mod optim;
pub mod parallel;
pub mod plan;
pub mod plot;
pub mod quickstart;
pub mod recipe;
pub mod schedule;
pub mod setup;
pub mod tensorboard;
pub mod trainer;

pub use error::{AcceptedNames, Blocker, Error, Location, Origin, Result, RowPlace};
