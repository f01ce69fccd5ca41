//! New adapters.

use std::collections::BTreeMap;

use super::{Adapter, LoraTensors, Target, targets};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::init::Stream;
use crate::weights::{DType, HostTensor};

/// How the matrices A are drawn; the matrices B are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraInit {
    /// Normal with variance `2 / (fan_in + fan_out)`.
    #[default]
    Xavier,
    /// Uniform between `-fan_in^-0.5` and `fan_in^-0.5`.
    Uniform,
}

/// What adapters a model gets.
///
/// Source: `PeftConfig` in NeMo AutoModel (`components/_peft/lora.py`), its names and defaults.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSettings {
    /// Patterns of the modules that get an adapter; without any setting, `*_proj`.
    pub target_modules: Vec<String>,
    /// Patterns of the linear maps that get none, where all others do.
    pub exclude_modules: Vec<String>,
    /// Whether every linear map gets one.
    pub match_all_linear: bool,
    /// Rank.
    pub dim: usize,
    /// The change is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Whether lengths of rows are trained apart from their directions.
    pub use_dora: bool,
    /// First values.
    pub lora_a_init: LoraInit,
    /// Whether the rank of the experts' adapters is divided by the number of experts a token takes.
    pub moe_rank_scaling: bool,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self {
            target_modules: Vec::new(),
            exclude_modules: Vec::new(),
            match_all_linear: false,
            dim: 8,
            alpha: 32.0,
            use_dora: false,
            lora_a_init: LoraInit::default(),
            moe_rank_scaling: false,
        }
    }
}

impl LoraSettings {
    /// The modules that get an adapter, with its rank.
    ///
    /// # Errors
    /// Settings that contradict each other or the model.
    pub fn plan(&self, config: &Config) -> Result<Vec<(Target, usize)>> {
        let modules = targets::matched(config, self)?;
        let wrong = |key, value: String, problem: String| Error::AdapterSettings { key, value, problem };
        let top_k = config.text.num_experts_per_tok;
        if self.use_dora && modules.iter().any(Target::is_stack) {
            let problem = "stacked experts have no DoRA; exclude them with target_modules, such as '*_proj'";
            return Err(wrong("use_dora", "true".into(), problem.into()));
        }
        if self.moe_rank_scaling && self.dim < top_k && modules.iter().any(Target::is_stack) {
            let problem =
                format!("divided by the {top_k} experts a token takes it is below 1; take {top_k} or more");
            return Err(wrong("dim", self.dim.to_string(), problem));
        }
        let rank = |target: &Target| match target.is_stack() && self.moe_rank_scaling {
            true => self.dim / top_k,
            false => self.dim,
        };
        Ok(modules.into_iter().map(|target| (rank(&target), target)).map(|(rank, t)| (t, rank)).collect())
    }

    /// New adapters that change nothing yet, the same for a seed; `weight` reads a weight (asked for with DoRA only).
    ///
    /// # Errors
    /// As [`LoraSettings::plan`], and a weight that cannot be read.
    pub fn adapter<E: From<Error>>(
        &self,
        config: &Config,
        seed: u64,
        dtype: DType,
        mut weight: impl FnMut(&Target) -> Result<HostTensor, E>,
    ) -> Result<Adapter, E> {
        let mut modules = BTreeMap::new();
        for (target, rank) in self.plan(config)? {
            let magnitude = match self.use_dora {
                true => Some(row_norms(weight(&target)?).cast(dtype)),
                false => None,
            };
            let (mut a, mut b) = (target.shape.clone(), target.shape.clone());
            let axes = target.shape.len();
            a[axes - 2] = rank;
            b[axes - 1] = rank;
            let values = self.draw(&target.name, seed, &a);
            let zeros = vec![0.0; b.iter().product()];
            let tensors = LoraTensors {
                a: HostTensor::f32(a, values).cast(dtype),
                b: HostTensor::f32(b, zeros).cast(dtype),
                magnitude,
                scale: self.alpha / rank as f64,
            };
            modules.insert(target.name, tensors);
        }
        let (replaced, base_model) = (BTreeMap::new(), None);
        Ok(Adapter { modules, replaced, rank: self.dim, alpha: self.alpha, base_model })
    }

    /// Values of an A. The fans of a stack are counted as torch counts those of NeMo AutoModel's `[E, in, r]`.
    fn draw(&self, name: &str, seed: u64, shape: &[usize]) -> Vec<f32> {
        let (fan_in, fan_out) = match *shape {
            [experts, rank, inputs] => (inputs * rank, experts * rank),
            [rank, inputs] => (inputs, rank),
            _ => unreachable!("a linear map or a stack of them"),
        };
        let stream = Stream::new(seed, &format!("{name}.lora.a"));
        let count: usize = shape.iter().product();
        match self.lora_a_init {
            LoraInit::Xavier => {
                let std = (2.0 / (fan_in + fan_out) as f64).sqrt();
                let normal = |index: usize| stream.normals(index as u64 / 2, 0)[index % 2];
                (0..count).map(|index| (normal(index) * std) as f32).collect()
            }
            LoraInit::Uniform => {
                let bound = (fan_in as f64).sqrt().recip();
                let uniform = |index: usize| 2.0 * stream.uniform(index as u64) - 1.0;
                (0..count).map(|index| (uniform(index) * bound) as f32).collect()
            }
        }
    }
}

/// Lengths of the rows of a matrix.
pub(super) fn row_norms(weight: HostTensor) -> HostTensor {
    let [rows, columns] = weight.shape[..] else { unreachable!("DoRA is for linear maps") };
    let values = weight.into_f32();
    let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt() as f32;
    let norms = if columns == 0 { vec![0.0; rows] } else { values.chunks_exact(columns).map(norm).collect() };
    HostTensor::f32([rows], norms)
}
