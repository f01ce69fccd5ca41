//! Backward rules of the collective operations: one node each.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;

use super::extension::CollectiveOps;
use super::{Exchange, Group};

/// Declares a node whose gradient is `$rule(gradient, state)`.
macro_rules! node {
    ($name:ident, $state:ty, $rule:expr) => {
        #[derive(Debug)]
        struct $name;

        impl<B: CollectiveOps> Backward<B, 1> for $name {
            type State = $state;

            fn backward(self, ops: Ops<$state, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let dy = grads.consume::<B>(&ops.node);
                if let [Some(parent)] = ops.parents {
                    grads.register::<B>(parent.id, $rule(dy, ops.state));
                }
            }
        }
    };
}

node!(ReduceFromGroup, (), |dy, ()| dy);
node!(CopyToGroup, Arc<dyn Group>, B::reduce_from_group);
node!(AllToAllRows, Exchange, |dy, exchange: Exchange| B::all_to_all_rows(dy, exchange.reversed()));

/// Runs `forward`, recorded as `node` where `x` is tracked.
macro_rules! record {
    ($node:ident, $x:expr, $state:expr, $forward:expr) => {{
        let op = $node.prepare::<C>([$x.node()]).compute_bound().stateful();
        let state = $state;
        let out = $forward($x.into_primitive());
        match op {
            OpsKind::Tracked(op) => op.finish(state, out),
            OpsKind::UnTracked(op) => op.finish(out),
        }
    }};
}

impl<B: CollectiveOps, C: CheckpointStrategy> CollectiveOps for Autodiff<B, C> {
    fn reduce_from_group(x: FloatTensor<Self>, group: Arc<dyn Group>) -> FloatTensor<Self> {
        record!(ReduceFromGroup, x, (), |x| B::reduce_from_group(x, group))
    }

    fn copy_to_group(x: FloatTensor<Self>, group: Arc<dyn Group>) -> FloatTensor<Self> {
        record!(CopyToGroup, x, group, |x| x)
    }

    fn all_to_all_rows(x: FloatTensor<Self>, exchange: Exchange) -> FloatTensor<Self> {
        record!(AllToAllRows, x, exchange.clone(), |x| B::all_to_all_rows(x, exchange))
    }
}
