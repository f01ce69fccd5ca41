//! The Mistral 4 model: multi-head latent attention, mixture of experts, Pixtral vision, generation.
