//! Which part of a model each rank of a mesh holds, and whom it computes with.

use std::sync::Arc;

use mistral4::checkpoint::config::Config;
use mistral4::model::ModelGroups;
use mistral4::ops::Group;
use mistral4::weights::{Partition, Share};

use super::groups::KeyGroups;
use super::holdings::Division;
use super::mesh::{Mesh, MeshShape, Place};
use super::pipeline::Pipeline;
use super::pipeline::schedule::split_layers;
use crate::error::{Error, Result};
use crate::recipe::PipelineConfig;

/// A rank's part of a model.
pub struct ModelLayout {
    /// What every rank holds.
    pub division: Division,
    /// The ranks with the other parts of this rank's layers.
    pub groups: ModelGroups,
    /// The ranks with the other layers; `None`: there are none.
    pub pipeline: Option<Pipeline>,
    /// Ranks that keep a parameter together, each its shard.
    pub shards: KeyGroups,
    /// Ranks that keep the same values of a parameter, computed from different data.
    pub replicas: KeyGroups,
    /// Ranks with the same part of the model and different data, each of which keeps all of that part's adapters.
    pub data: KeyGroups,
}

impl ModelLayout {
    /// Divides a model over a mesh; collective.
    ///
    /// # Errors
    /// Sizes of the model that the mesh does not divide, with the arithmetic.
    pub fn new(mesh: &Mesh, config: &Config, pipeline: PipelineConfig) -> Result<Self> {
        let division = Division::new(mesh.shape, mesh.is_sharded(), config, pipeline)?;
        let shape = mesh.shape;
        let Place { pp, dp_replicate, dp_shard, cp, tp } = mesh.place;
        let (world, rank) = (&mesh.world, mesh.world.rank());
        let layers = config.text.num_hidden_layers;
        // Ranks that agree in everything but the side that a group runs along have one color.
        let stage = ((dp_replicate * shape.dp_shard + dp_shard) * shape.cp + cp) * shape.tp + tp;
        let chunks = pipeline.chunks(layers, shape.pp);
        let pipeline = match shape.pp {
            1 => None,
            _ => Some(Pipeline::new(world.split(stage, pp), layers, chunks)?),
        };
        let group = |color: usize| {
            let group = world.split(color, rank);
            (group.size() > 1).then(|| Arc::new(group) as Arc<dyn Group>)
        };
        let beside = (pp * shape.cp + cp) * shape.tp + tp;
        let replica = beside * shape.dp_replicate + dp_replicate;
        let tensor = group(rank / shape.tp);
        let expert = group(replica * (shape.dp_shard / shape.ep) + dp_shard / shape.ep);
        let share = dp_shard % shape.ep;
        // A mesh without expert parallelism keeps experts as everything else.
        let for_experts = |color: usize| (shape.ep > 1).then(|| world.split(color * shape.ep + share, rank));
        let shards = KeyGroups { others: mesh.shard.clone(), experts: for_experts(replica) };
        let data = KeyGroups { others: mesh.data.clone(), experts: for_experts(beside) };
        let replicas = match mesh.is_sharded() {
            true => KeyGroups { others: mesh.replicate.clone(), experts: None },
            false => data.clone(),
        };
        Ok(Self { division, groups: ModelGroups { tensor, expert }, pipeline, shards, replicas, data })
    }
}

impl Division {
    /// How a mesh divides a model.
    ///
    /// # Errors
    /// As [`ModelLayout::new`].
    pub fn new(mesh: MeshShape, is_sharded: bool, config: &Config, pipeline: PipelineConfig) -> Result<Self> {
        check(config, mesh)?;
        let layers = config.text.num_hidden_layers;
        let chunks = pipeline.chunks(layers, mesh.pp);
        let stages = split_layers(layers, mesh.pp, chunks)?;
        let partition = |rank| {
            let place = mesh.place(rank);
            let held: Vec<_> = (0..chunks).map(|chunk| stages[chunk * mesh.pp + place.pp].clone()).collect();
            Partition {
                tensor: Share { index: place.tp, of: mesh.tp },
                expert: Share { index: place.dp_shard % mesh.ep, of: mesh.ep },
                has_embeddings: held.iter().any(|run| run.start == 0),
                has_head: held.iter().any(|run| run.end == layers),
                layers: held,
            }
        };
        Ok(Self { mesh, is_sharded, partitions: (0..mesh.ranks()).map(partition).collect() })
    }
}

/// Refuses widths that do not divide.
fn check(config: &Config, MeshShape { tp, ep, .. }: MeshShape) -> Result<()> {
    let c = &config.text;
    let mut sizes = vec![
        ("n_routed_experts", c.n_routed_experts, "ep_size", ep),
        ("num_attention_heads", c.num_attention_heads, "tp_size", tp),
        ("moe_intermediate_size", c.moe_intermediate_size, "tp_size", tp),
    ];
    if c.first_k_dense_replace > 0 {
        sizes.push(("intermediate_size", c.intermediate_size, "tp_size", tp));
    }
    match sizes.into_iter().find(|(_, size, _, ranks)| !size.is_multiple_of(*ranks)) {
        None => Ok(()),
        Some((name, size, key, ranks)) => Err(Error::Inconsistent {
            key: format!("distributed.{key}"),
            value: ranks.to_string(),
            message: format!("{name} {size} is not divisible by {key} {ranks}"),
        }),
    }
}
