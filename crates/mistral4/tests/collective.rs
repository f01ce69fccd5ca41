//! Collective operations, their gradients, and experts over ranks, each rank a thread.

use std::sync::{Arc, Barrier, Mutex};

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor, TensorData};
use mistral4::checkpoint::config::{Config, ConfigFile, ConfigOptions};
use mistral4::checkpoint::weights::{self, HostData, HostTensor};
use mistral4::model::ModelGroups;
use mistral4::model::moe::MoeOptions;
use mistral4::ops::Group;
use mistral4::ops::collective::{Exchange, all_to_all_rows, copy_to_group, reduce_from_group};
use mistral4::weights::{InitialSource, ParameterSource};
use mistral4::{ForwardOptions, Mistral4, ModelInputs, Result};

/// One of several threads, which meet at a table with a place for each.
#[derive(Debug, Clone)]
struct Thread {
    rank: usize,
    table: Arc<Vec<Mutex<Vec<u8>>>>,
    barrier: Arc<Barrier>,
}

impl Thread {
    /// Everybody's bytes.
    fn share(&self, mine: &[u8]) -> Vec<Vec<u8>> {
        *self.table[self.rank].lock().unwrap() = mine.to_vec();
        self.barrier.wait();
        let all = self.table.iter().map(|place| place.lock().unwrap().clone()).collect();
        self.barrier.wait();
        all
    }
}

impl Group for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.table.len()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) {
        let all = self.share(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        values.fill(0.0);
        for theirs in all {
            let theirs = theirs.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
        }
    }

    fn all_to_all(&self, send: &[u8], send_counts: &[usize], receive: &mut [u8], receive_counts: &[usize]) {
        let counts: Vec<u8> = send_counts.iter().flat_map(|&count| (count as u64).to_le_bytes()).collect();
        let counts = self.share(&counts);
        let (mut at, all) = (0, self.share(send));
        for (rank, theirs) in all.iter().enumerate() {
            let counts: Vec<usize> =
                counts[rank].as_chunks::<8>().0.iter().map(|&c| u64::from_le_bytes(c) as usize).collect();
            let start: usize = counts[..self.rank].iter().sum();
            assert_eq!(counts[self.rank], receive_counts[rank], "what is sent is what is awaited");
            receive[at..at + receive_counts[rank]].copy_from_slice(&theirs[start..start + counts[self.rank]]);
            at += receive_counts[rank];
        }
        assert_eq!(at, receive.len());
    }
}

/// Runs `work` on every rank; what they return, in the order of ranks.
fn ranks<T: Send>(size: usize, work: impl Fn(Arc<dyn Group>) -> T + Sync) -> Vec<T> {
    let table: Arc<Vec<Mutex<Vec<u8>>>> = Arc::new((0..size).map(|_| Mutex::default()).collect());
    let barrier = Arc::new(Barrier::new(size));
    std::thread::scope(|scope| {
        let start = |rank| {
            let group = Thread { rank, table: Arc::clone(&table), barrier: Arc::clone(&barrier) };
            let work = &work;
            scope.spawn(move || work(Arc::new(group)))
        };
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn tracked(values: Vec<f32>, rows: usize) -> Tensor<2> {
    let width = values.len().checked_div(rows).unwrap_or(2);
    let device = Device::flex();
    let tensor = Tensor::<2>::from_data(TensorData::new(values, [rows, width]), (&device, DType::F32));
    tensor.autodiff().require_grad()
}

#[test]
fn sums_and_copies_are_each_others_gradients() {
    let all = ranks(3, |group| {
        let factor = (group.rank() + 1) as f64;
        let group = Some(group);
        let x = tracked(vec![1.0, 2.0], 1);
        // Every rank sums `factor * x` of all, and weighs the sum by 10.
        let sum = reduce_from_group(copy_to_group(x.clone(), &group) * factor, &group);
        let out = values(sum.clone().inner());
        let mut gradients = (sum * 10.0).sum().backward();
        (out, values(x.grad_remove(&mut gradients).unwrap()))
    });
    for (out, gradient) in all {
        assert_eq!(out, [6.0, 12.0]);
        assert_eq!(gradient, [60.0, 60.0], "10 * (1 + 2 + 3)");
    }
}

#[test]
fn rows_travel_and_their_gradients_return() {
    // Rank r sends r rows to rank 0, none to rank 1, one to rank 2.
    let all = ranks(3, |group| {
        let rank = group.rank();
        let receive: Vec<usize> = [vec![0, 1, 2], vec![0; 3], vec![1; 3]][rank].clone();
        let exchange = Exchange { group, send: vec![rank, 0, 1].into(), receive: receive.into() };
        let x = tracked((0..2 * (rank + 1)).map(|i| (10 * rank + i) as f32).collect(), rank + 1);
        let y = all_to_all_rows(x.clone(), &exchange);
        let out = values(y.clone().inner());
        let mut gradients = (y * (rank + 1) as f64).sum().backward();
        (out, values(x.grad_remove(&mut gradients).unwrap()))
    });
    assert_eq!(all[0].0, [10.0, 11.0, 20.0, 21.0, 22.0, 23.0]);
    assert_eq!((all[1].0.len(), &all[2].0[..2]), (0, &[0.0, 1.0][..]));
    assert_eq!(all[0].1, [3.0; 2]);
    assert_eq!(all[2].1, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]);
}

fn config() -> Config {
    let raw = serde_json::json!({
        "model_type": "mistral4", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
        "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 12, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "initializer_range": 0.3,
        "max_position_embeddings": 64, "tie_word_embeddings": false,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}
    });
    ConfigFile::from_value(raw, "test.json".as_ref(), &ConfigOptions::default()).unwrap().config
}

/// One half of the experts, and everything else.
struct HalfOfExperts<'a>(InitialSource<'a>, usize);

impl ParameterSource for HalfOfExperts<'_> {
    fn tensor(&self, key: &str, shape: &[usize], f32: bool) -> Result<HostTensor> {
        let whole = self.0.tensor(key, shape, f32)?;
        if !key.contains(".experts.") {
            return Ok(whole);
        }
        let HostData::F32(values) = whole.data else { unreachable!("drawn in f32") };
        let half = values.len() / 2;
        let shape = [vec![shape[0] / 2], shape[1..].to_vec()].concat();
        Ok(HostTensor::f32(shape, values[self.1 * half..(self.1 + 1) * half].to_vec()))
    }

    fn dtype(&self) -> weights::DType {
        self.0.dtype()
    }
}

/// Logits, and the gradients of their sum by a router and all experts of its layer.
fn step(model: &Mistral4, ids: Vec<u32>) -> (Vec<f32>, Vec<Vec<f32>>) {
    let inputs = ModelInputs::rows(ids, 1);
    let Mistral4::Text(text) = model else { unreachable!("there is no tower") };
    let trained = Mistral4::Text(Box::new(text.as_ref().clone().train()));
    let logits = trained.forward(&inputs, None, &ForwardOptions::default()).unwrap().logits.unwrap();
    let out = values(logits.clone().inner());
    let mut from = logits.square().sum().backward();
    let mut gradients = Vec::new();
    trained.take_gradients(&mut from, |key, gradient| {
        if key.starts_with("model.layers.0.mlp.")
            && (key.contains("gate.weight") || key.contains(".experts."))
        {
            gradients.push(values(gradient));
        }
    });
    (out, gradients)
}

#[test]
fn experts_over_ranks_give_the_outputs_and_gradients_of_one() {
    let config = config();
    let model = |source: &dyn ParameterSource| {
        Mistral4::new(&config, MoeOptions::default(), source, &Device::flex()).unwrap()
    };
    let initial = || InitialSource::new(&config, 3, weights::DType::F32);
    let ids = |rank: usize| (0..[9, 1][rank]).map(|i| (i * 7 + rank as u32 * 3) % 40).collect::<Vec<u32>>();
    let whole = model(&initial());
    let one: Vec<_> = (0..2).map(|rank| step(&whole, ids(rank))).collect();
    let two = ranks(2, |group| {
        let rank = group.rank();
        let mut model = model(&HalfOfExperts(initial(), rank));
        model.set_groups(&ModelGroups { tensor: None, expert: Some(group) });
        step(&model, ids(rank))
    });
    let close = |a: &[f32], b: &[f32]| {
        let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * largest)
    };
    for rank in 0..2 {
        assert!(close(&two[rank].0, &one[rank].0), "logits of rank {rank}");
        assert!(close(&two[rank].1[0], &one[rank].1[0]), "the router sees its own tokens");
        for expert in 1..3 {
            // A rank's experts see everybody's tokens.
            let sum: Vec<f32> = one[0].1[expert].iter().zip(&one[1].1[expert]).map(|(a, b)| a + b).collect();
            let half = sum.len() / 2;
            assert!(close(&two[rank].1[expert], &sum[rank * half..(rank + 1) * half]), "experts of {rank}");
        }
    }
}
