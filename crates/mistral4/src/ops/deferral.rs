//! Gradients of experts' weights that leave a backward pass as products, not multiplied out.

use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use mistral4_kernels as kernels;

/// Where the backward pass of a layer's experts leaves the gradients of their weights as products while somebody waits for
/// them here, if the factors are much smaller; otherwise it multiplies them out. Clones are one place.
///
/// The kernels of the CPU use it; elsewhere it stays empty.
#[derive(Debug, Clone, Default)]
pub struct Deferral(Arc<Mutex<Place>>);

#[derive(Debug, Default)]
enum Place {
    #[default]
    Closed,
    Open,
    Filled(Box<ExpertGradients>),
}

/// Gradients of the weights of a layer's experts.
#[derive(Debug)]
pub struct ExpertGradients {
    /// `[E, 2F, D]`
    pub gate_up: DeferredGradient,
    /// `[E, D, F]`
    pub down: DeferredGradient,
}

/// The gradient of a stack of weights as a product.
#[derive(Debug)]
pub enum DeferredGradient {
    /// Of f32 activations.
    F32(kernels::DeferredGradient<f32>),
    /// Of bf16 activations.
    Bf16(kernels::DeferredGradient<bf16>),
}

impl Deferral {
    /// Waits for gradients.
    pub fn open(&self) {
        self.set(Place::Open);
    }

    /// What the backward pass left, if it left anything; it multiplies gradients out again.
    pub fn close(&self) -> Option<ExpertGradients> {
        match self.set(Place::Closed) {
            Place::Filled(gradients) => Some(*gradients),
            Place::Open | Place::Closed => None,
        }
    }

    /// Whether gradients of so many `elements` shall come as products of factors of so many.
    pub(super) fn wants(&self, factors: usize, elements: usize) -> bool {
        // With as many rows an expert as to make factors large, multiplying out is most of the work, and the norm of a
        // product costs as much as the product.
        let are_small = 2 * factors <= elements;
        are_small && matches!(*self.0.lock().unwrap_or_else(PoisonError::into_inner), Place::Open)
    }

    pub(super) fn fill(&self, gradients: ExpertGradients) {
        self.set(Place::Filled(Box::new(gradients)));
    }

    fn set(&self, place: Place) -> Place {
        std::mem::replace(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), place)
    }
}

impl DeferredGradient {
    /// Adam step `step` (counted from 1) on the weight.
    ///
    /// # Panics
    /// When a slice of `weight` has another length than the gradient, or `step` is 0.
    pub fn step<V: kernels::Element, S: kernels::Element>(
        &self,
        hyper: &kernels::AdamW,
        step: u64,
        weight: kernels::AdamWWeight<'_, V, S>,
    ) {
        match self {
            DeferredGradient::F32(gradient) => gradient.step(hyper, step, weight),
            DeferredGradient::Bf16(gradient) => gradient.step(hyper, step, weight),
        }
    }

    /// Sum of the gradient's squares.
    pub fn square(&self) -> f64 {
        match self {
            DeferredGradient::F32(gradient) => gradient.square(),
            DeferredGradient::Bf16(gradient) => gradient.square(),
        }
    }
}

impl From<kernels::DeferredGradient<f32>> for DeferredGradient {
    fn from(gradient: kernels::DeferredGradient<f32>) -> Self {
        DeferredGradient::F32(gradient)
    }
}

impl From<kernels::DeferredGradient<bf16>> for DeferredGradient {
    fn from(gradient: kernels::DeferredGradient<bf16>) -> Self {
        DeferredGradient::Bf16(gradient)
    }
}
