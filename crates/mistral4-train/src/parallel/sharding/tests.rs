use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use mistral4::weights::named_parameters;

use super::*;
use crate::parallel::Mesh;
use crate::parallel::communicator::threads;
use crate::recipe::Recipe;
use crate::setup::Setup;

const RECIPE: &str = "recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {global_batch_size: 4, local_batch_size: 1}
model: {_target_: NeMoAutoModelForCausalLM.from_config, config: tiny, torch_dtype: float32}
dataset: {_target_: MockIterableDataset, vocab_size: 40, seq_len: 9, num_samples: 26}
optimizer: {_target_: AdamW}
";
/// Long enough for any machine, and short enough to wait for when a test fails.
const PATIENCE: Duration = Duration::from_secs(20);

const POLICY: ShardingPolicy = ShardingPolicy { sums_each: false, keeps_gathered: false };

/// Two ranks, each with its part of a model.
fn on_two_ranks<T: Send>(work: impl Fn(&Setup, &Sharding, &Communicator) -> T + Sync) -> Vec<T> {
    threads::run(2, |world| {
        let recipe = Recipe::parse("r.yaml", RECIPE.as_bytes(), &[], &|_| None).unwrap();
        let mesh = Mesh::new(&recipe.distributed, world).unwrap();
        let setup = Setup::start(&recipe, &Device::flex(), None, &mesh).unwrap();
        let sharding = Sharding::new(&setup.model, &setup.holdings, &setup.layout.shards);
        work(&setup, &sharding, &mesh.world)
    })
}

/// A gradient for each trained parameter of the head, all values `value`.
fn of_head(sharding: &Sharding, value: f32) -> Vec<(String, Tensor<1>)> {
    let ones = |key: &String| {
        let count: usize = sharding.shapes[key].iter().product();
        (key.clone(), Tensor::full([count], value, (&Device::flex(), DType::F32)))
    };
    sharding.trained[&Unit::Head].iter().map(ones).collect()
}

/// Whether every parameter of a layer that is sharded has all of its values.
fn is_whole(setup: &Setup, sharding: &Sharding, index: usize, layer: &DecoderLayer) -> bool {
    let prefix = format!("{}model.layers.{index}.", setup.model.text_prefix());
    named_parameters(layer).iter().all(|parameter| {
        let shape = sharding.shapes.get(&format!("{prefix}{}", parameter.key));
        shape.is_none_or(|shape| *shape == parameter.shape)
    })
}

#[test]
fn parts_are_whole_blocks_and_cover_everything() {
    for (elements, ranks) in [(0, 3), (1, 2), (256, 2), (1000, 3), (65_536, 4)] {
        let parts: Vec<_> = (0..ranks).map(|rank| part_of(elements, rank, ranks)).collect();
        assert_eq!((parts[0].start, parts[ranks - 1].end), (0, elements));
        assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(parts.iter().all(|part| part.start.is_multiple_of(BLOCK) || part.start == elements));
    }
    assert_eq!(part_of(65_536, 1, 4), 16_384..32_768);
}

#[test]
fn the_next_layer_arrives_while_this_one_is_used() {
    on_two_ranks(|setup, sharding, _| {
        let mut gradients = ShardedGradients::default();
        let mut store = ShardedStore::new(&setup.model, sharding, &mut gradients, POLICY);
        assert!(!is_whole(setup, sharding, 0, &setup.model.text().model.layers[0]));
        store.front(Some(Unit::Layer(0)));
        let begin = Instant::now();
        while !sharding.lane.is_idle() {
            assert!(begin.elapsed() < PATIENCE, "the layer does not arrive by itself");
            std::thread::yield_now();
        }
        assert!(is_whole(setup, sharding, 0, &store.layer(0, None)));
    });
}

#[test]
fn gradients_are_summed_while_the_walk_goes_on() {
    let (passed, has_passed) = channel();
    let has_passed = Mutex::new(has_passed);
    on_two_ranks(|setup, sharding, world| {
        let mut gradients = ShardedGradients::default();
        let mut store = ShardedStore::new(&setup.model, sharding, &mut gradients, POLICY);
        if world.rank() == 1 {
            // The other rank goes on although this one has given nothing yet.
            has_passed.lock().unwrap().recv_timeout(PATIENCE).expect("the other rank waits for this one");
        }
        store.set_last(true);
        store.add(Unit::Head, of_head(sharding, 1.0));
        passed.send(()).unwrap();
        store.finish();
        let mut count = 0;
        for key in sharding.trained[&Unit::Head].iter() {
            let sum = gradients.parts.get(key).unwrap().clone().into_data().try_into_vec::<f32>().unwrap();
            assert!(sum.iter().all(|&sum| sum == 2.0), "{key}");
            count += sum.len();
        }
        assert!(count > 0);
    });
}

#[test]
fn waiting_for_a_slow_rank_is_counted() {
    const LATE: Duration = Duration::from_millis(300);
    on_two_ranks(|setup, sharding, world| {
        let mut gradients = ShardedGradients::default();
        let mut store = ShardedStore::new(&setup.model, sharding, &mut gradients, POLICY);
        store.set_last(true);
        if world.rank() == 1 {
            std::thread::sleep(LATE);
        }
        let waited = world.waited();
        store.add(Unit::Head, of_head(sharding, 1.0));
        store.finish();
        let waited = world.waited() - waited;
        assert!(world.rank() == 1 || waited > LATE / 2, "{waited:?}");
    });
}

#[test]
fn only_the_last_micro_batch_is_summed_over_ranks() {
    for sums_each in [false, true] {
        on_two_ranks(|setup, sharding, _| {
            let mut gradients = ShardedGradients::default();
            let policy = ShardingPolicy { sums_each, ..POLICY };
            let mut store = ShardedStore::new(&setup.model, sharding, &mut gradients, policy);
            for (value, is_last) in [(1.0, false), (2.0, false), (4.0, true)] {
                store.set_last(is_last);
                store.add(Unit::Head, of_head(sharding, value));
                assert_eq!(store.sums.is_empty(), !is_last && !sums_each);
            }
            store.finish();
            for key in sharding.trained[&Unit::Head].iter() {
                let sum = gradients.parts.get(key).unwrap().clone().into_data();
                assert!(sum.try_into_vec::<f32>().unwrap().iter().all(|&sum| sum == 14.0), "{key}");
            }
        });
    }
}

#[test]
fn what_stays_is_gathered_once() {
    on_two_ranks(|setup, sharding, _| {
        let mut gradients = ShardedGradients::default();
        let policy = ShardingPolicy { keeps_gathered: true, ..POLICY };
        let mut store = ShardedStore::new(&setup.model, sharding, &mut gradients, policy);
        for is_first in [true, false] {
            store.front(Some(Unit::Layer(0)));
            assert_eq!(store.ahead.is_some(), is_first);
            assert!(is_whole(setup, sharding, 0, &store.layer(0, None)));
        }
    });
}
