//! Training of Mistral 4: recipes, data, loss, optimiser, checkpoints, metrics.
