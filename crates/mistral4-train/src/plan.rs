//! What a run would take, from its recipe and the model's configuration alone.

use std::collections::HashMap;
use std::fmt;

use mistral4::weights::adapter_key;
use mistral4_checkpoint::weights::names::{TensorKind, tensors};
use mistral4_checkpoint::weights::{DType, WeightFormat};

use crate::backward::Unit;
use crate::error::{Error, Result};
use crate::optim::ParameterState;
use crate::parallel::MeshShape;
use crate::parallel::holdings::{Division, stays_quantized};
use crate::parallel::sharding::is_kept_whole;
use crate::recipe::{OptimizerConfig, Recipe, Strategy};
use crate::setup::{Base, frozen};

/// Memory of one rank, in bytes, besides activations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankMemory {
    /// Weights that the rank keeps.
    pub weights: u64,
    /// Gradients of the trained parameters, in f32 where they are summed; whole ones of a sharded model, where they wait for
    /// the last pass of a step.
    pub gradients: u64,
    /// The optimizer's two moments in f32, and the weights in f32 where they are kept in less.
    pub optimizer: u64,
    /// What of a sharded model is whole at the same time: the layer in use and the next, or everything, where it stays
    /// after the forward pass.
    pub gathered: u64,
}

impl RankMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.gathered
    }
}

/// What a run would take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The mesh.
    pub mesh: MeshShape,
    /// How parameters are kept.
    pub strategy: Strategy,
    /// Rows of a forward and backward pass.
    pub local_batch_size: usize,
    /// Passes of a rank in a step.
    pub grad_acc_steps: usize,
    /// Memory of the fullest rank; `None` where the model's configuration is not on this machine.
    pub memory: Option<RankMemory>,
}

impl Plan {
    /// The plan of a recipe on `ranks` ranks.
    ///
    /// # Errors
    /// A mesh or batch size that does not fit, and a model that cannot be read.
    pub fn new(recipe: &Recipe, ranks: usize) -> Result<Self> {
        let mesh = MeshShape::new(&recipe.distributed, ranks)?;
        let step = &recipe.step_scheduler;
        let pass = step.local_batch_size * mesh.dp();
        if !step.global_batch_size.is_multiple_of(pass) {
            return Err(Error::Inconsistent {
                key: "step_scheduler.global_batch_size".to_owned(),
                value: step.global_batch_size.to_string(),
                message: format!(
                    "must be divisible by local_batch_size * data-parallel ranks ({} * {})",
                    step.local_batch_size,
                    mesh.dp()
                ),
            });
        }
        let grad_acc_steps = step.global_batch_size / pass;
        Ok(Self {
            mesh,
            strategy: recipe.distributed.strategy,
            local_batch_size: step.local_batch_size,
            grad_acc_steps,
            memory: memory(recipe, &mesh, grad_acc_steps)?,
        })
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mesh, local_batch_size, grad_acc_steps, .. } = self;
        let keeps = match (self.strategy, mesh.pp * mesh.tp * mesh.ep) {
            (Strategy::FullyShard, _) if mesh.dp_shard > 1 => "its part of every parameter",
            (_, 1) => "all parameters",
            _ => "its layers, heads, columns and experts",
        };
        writeln!(f, "mesh: {mesh}; a rank keeps {keeps}")?;
        writeln!(
            f,
            "step: {local_batch_size} rows a pass * {grad_acc_steps} passes * {} data-parallel ranks = {} rows",
            mesh.dp(),
            local_batch_size * grad_acc_steps * mesh.dp()
        )?;
        let Some(memory) = self.memory else {
            return writeln!(f, "memory: unknown until the model's configuration is on this machine");
        };
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        writeln!(
            f,
            "memory of a rank, activations left out: weights {:.3} + gradients {:.3} + optimizer {:.3} + gathered {:.3} = {:.3} GiB",
            gib(memory.weights),
            gib(memory.gradients),
            gib(memory.optimizer),
            gib(memory.gathered),
            gib(memory.total())
        )
    }
}

/// A tensor of the model or of its adapters.
struct Item {
    key: String,
    shape: Vec<usize>,
    /// Bytes of a value.
    width: u64,
    /// Bits of a value that stays quantised, its part of the scales included.
    quantized_bits: Option<f64>,
    is_trained: bool,
}

/// Bits of a value, with its part of a scale in f32 and of a zero point.
fn quantized_bits(format: WeightFormat) -> f64 {
    match format {
        WeightFormat::Int { bits, group_size, symmetric } => {
            bits.count() as f64 + (32.0 + if symmetric { 0.0 } else { 8.0 }) / group_size as f64
        }
        WeightFormat::Fp8 => 8.0,
    }
}

fn memory(recipe: &Recipe, mesh: &MeshShape, grad_acc_steps: usize) -> Result<Option<RankMemory>> {
    let Some((config, dtype)) = Base::describe(&recipe.model)? else { return Ok(None) };
    let width = |dtype: DType| dtype.stored().size() as u64;
    let is_frozen = frozen(recipe.freeze_config);
    let base = tensors(&config.config).into_iter().map(|spec| Item {
        quantized_bits: recipe.quantization.and_then(|how| how.of(&spec)).map(quantized_bits),
        is_trained: recipe.peft.is_none() && spec.kind != TensorKind::GateBias && !is_frozen(&spec.key),
        key: spec.key,
        shape: spec.shape,
        width: width(dtype),
    });
    let mut items: Vec<Item> = base.collect();
    if let Some(peft) = &recipe.peft {
        for (target, rank) in peft.lora.plan(&config.config)? {
            let axes = target.shape.len();
            let (mut a, mut b) = (target.shape.clone(), target.shape.clone());
            (a[axes - 2], b[axes - 1]) = (rank, rank);
            let magnitude = peft.lora.use_dora.then(|| ("magnitude", vec![target.shape[0]]));
            items.extend([("a", a), ("b", b)].into_iter().chain(magnitude).map(|(part, shape)| Item {
                key: adapter_key(&target.name, axes, part),
                shape,
                width: width(peft.lora_dtype.unwrap_or(dtype)),
                quantized_bits: None,
                is_trained: true,
            }));
        }
    }
    let distributed = &recipe.distributed;
    let is_sharded = distributed.strategy == Strategy::FullyShard && mesh.dp_shard > 1;
    let division = Division::new(*mesh, is_sharded, &config.config, distributed.pipeline)?;
    let step = StepMemory {
        whole_gradients: is_sharded && distributed.defer_fsdp_grad_sync && grad_acc_steps > 1,
        whole_weights: is_sharded && !distributed.reshard_after_forward,
        // Sums over micro-batches and ranks are in f32.
        summed_gradients: grad_acc_steps > 1 || mesh.ranks() > 1,
        gradients_of_a_unit: recipe.optimizer_in_bwd,
    };
    let ranks = (0..mesh.ranks()).map(|rank| rank_memory(&division, rank, step, (&items, &recipe.optimizer)));
    Ok(ranks.max_by_key(RankMemory::total))
}

/// What of a model is there at once in a step.
#[derive(Clone, Copy)]
struct StepMemory {
    /// Of a sharded model's parameters, whole gradients until the end.
    whole_gradients: bool,
    /// Of a sharded model's parameters, whole weights until the end.
    whole_weights: bool,
    /// Gradients are summed, in f32; otherwise they are in the parameters' number format.
    summed_gradients: bool,
    /// The gradients of one unit at a time.
    gradients_of_a_unit: bool,
}

fn rank_memory(
    division: &Division,
    rank: usize,
    step: StepMemory,
    (items, optimizer): (&[Item], &OptimizerConfig),
) -> RankMemory {
    let mut memory = RankMemory::default();
    let mut all = 0;
    let (mut gathered, mut gradients) = (HashMap::<Unit, u64>::new(), HashMap::<Unit, u64>::new());
    for Item { key, shape, width, quantized_bits, is_trained } in items {
        let Some(held) = division.held(key, shape, rank) else { continue };
        let kept = held.range.len() as u64;
        let bits =
            quantized_bits.filter(|_| stays_quantized(&held.part, shape)).unwrap_or(8.0 * *width as f64);
        let bytes = |values: u64| (values as f64 * bits / 8.0) as u64;
        memory.weights += bytes(kept);
        let is_spread = division.is_sharded && !is_kept_whole(key);
        let elements = held.part.elements() as u64;
        let unit = Unit::of(key.strip_prefix("language_model.").unwrap_or(key), "");
        if *is_trained {
            let gradient_width = if step.summed_gradients { 4 } else { *width };
            *gradients.entry(unit).or_default() +=
                gradient_width * if step.whole_gradients && is_spread { elements } else { kept };
            let of_value = ParameterState::expected_bytes(optimizer, key, shape, *width < 4);
            memory.optimizer += (kept as f64 * of_value) as u64;
        }
        if is_spread {
            all += bytes(elements);
            *gathered.entry(unit).or_default() += bytes(elements);
        }
    }
    let gradients = gradients.into_values();
    memory.gradients = if step.gradients_of_a_unit { gradients.max().unwrap_or(0) } else { gradients.sum() };
    // Layers are alike but for the first dense ones; the front and the head are gathered one at a time.
    gathered.retain(|unit, _| matches!(unit, Unit::Layer(_)));
    memory.gathered = if step.whole_weights { all } else { 2 * gathered.into_values().max().unwrap_or(0) };
    memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::parse_overrides;

    fn plan(ranks: usize, overrides: &[&str]) -> Result<Plan> {
        let recipe = "recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 16, local_batch_size: 2}
model: {_target_: NeMoAutoModelForCausalLM.from_config, config: tiny, torch_dtype: float32}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
optimizer: {_target_: AdamW}
";
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let overrides = parse_overrides(&overrides).unwrap();
        Plan::new(&Recipe::parse("r.yaml", recipe.as_bytes(), &overrides, &|_| None).unwrap(), ranks)
    }

    #[test]
    fn shards_divide_what_replicas_repeat() {
        let one = plan(1, &[]).unwrap().memory.unwrap();
        let copies = plan(4, &["--distributed.strategy", "ddp"]).unwrap().memory.unwrap();
        assert_eq!((one, one.gathered), (copies, 0));
        assert_eq!((one.gradients * 2, one.weights / one.gradients), (one.optimizer, 1));
        let shards = plan(4, &[]).unwrap().memory.unwrap();
        let quarter = shards.optimizer as f64 / one.optimizer as f64;
        assert!((0.25..0.3).contains(&quarter), "{quarter}");
        // Two passes a step: whole gradients wait for the second one, unless they are summed after each.
        assert_eq!(shards.gradients, one.gradients);
        let each = plan(4, &["--distributed.defer_fsdp_grad_sync", "false"]).unwrap().memory.unwrap();
        assert_eq!(each.gradients * 2, each.optimizer);
        assert!(shards.gathered > 0);
        let stays = plan(4, &["--distributed.reshard_after_forward", "false"]).unwrap().memory.unwrap();
        assert!(stays.gathered > shards.gathered && stays.gathered <= one.weights, "{stays:?} {one:?}");
    }

    #[test]
    fn gradients_of_one_micro_batch_are_as_narrow_as_their_parameters_and_need_not_exist_together() {
        let bf16 = ["--model.torch_dtype", "bfloat16", "--step_scheduler.local_batch_size", "16"];
        let one = plan(1, &bf16).unwrap().memory.unwrap();
        // All but the biases that balance the experts, which have none.
        let biases = one.weights - one.gradients;
        assert!(biases > 0 && biases < one.weights / 1000, "{one:?}");
        let summed = plan(1, &bf16[..2]).unwrap().memory.unwrap();
        assert_eq!(summed.gradients, 2 * one.gradients);
        let mut in_bwd = bf16.to_vec();
        in_bwd.extend(["--optimizer_in_bwd", "true"]);
        let unit = plan(1, &in_bwd).unwrap().memory.unwrap();
        assert!(unit.gradients > 0 && 2 * unit.gradients < one.gradients, "{unit:?} {one:?}");
        assert_eq!((unit.weights, unit.optimizer), (one.weights, one.optimizer));
    }

    #[test]
    fn adapters_alone_have_gradients_and_are_kept_whole_but_for_experts() {
        let peft =
            ["--peft.target_modules", "[lm_head, '*.mlp.experts']", "--model.gate_bias_update_factor", "0"];
        let whole = plan(1, &[]).unwrap().memory.unwrap();
        let one = plan(1, &peft).unwrap().memory.unwrap();
        let two = plan(2, &[&peft[..], &["--distributed.ep_size", "2"]].concat()).unwrap().memory.unwrap();
        let adapters = one.weights - whole.weights;
        assert_eq!((one.gradients, one.optimizer), (adapters, 2 * adapters));
        assert!(two.gradients < one.gradients && two.gradients > one.gradients / 2, "{two:?} {one:?}");
    }

    #[test]
    fn steps_and_their_arithmetic_are_shown() {
        let text = plan(4, &["--distributed.dp_replicate_size", "2"]).unwrap().to_string();
        assert!(text.contains("2 rows a pass * 2 passes * 4 data-parallel ranks = 16 rows"), "{text}");
        let message = plan(3, &[]).unwrap_err().to_string();
        assert!(message.contains("(2 * 3)"), "{message}");
    }
}
