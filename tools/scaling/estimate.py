"""Memory and time of a training step of one layout, from bytes and FLOPs. Every formula is explained in docs/scaling.md."""

from dataclasses import dataclass

from model import BF16, F32, Model


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links, each way; published figures."""

    name: str
    flops: float  # dense bf16
    memory: float  # bytes
    hbm: float  # bytes/s
    nvlink: float  # bytes/s
    network: float  # bytes/s, one 400 Gb/s adapter a GPU
    per_node: int = 8


H100 = Gpu("H100 80 GB", 989e12, 80e9, 3.35e12, 450e9, 50e9)
H200 = Gpu("H200 141 GB", 989e12, 141e9, 4.8e12, 450e9, 50e9)

# Shares of the peaks that good kernels and collectives reach.
DENSE, GROUPED, ATTENTION, STREAM, LINK = 0.70, 0.55, 0.45, 0.80, 0.80
# Part of a communication that can hide behind computing, where the code starts it early.
OVERLAP = 0.8
# Context, libraries, fragmentation.
RESERVED = 6e9
# bf16 weight; f32 gradient, master and two moments.
STATE_BYTES = BF16 + F32 + F32 + 2 * F32
# Bytes that the optimizer reads and writes a parameter: gradient read; weight written; master and moments both.
OPTIMIZER_BYTES = F32 + BF16 + 6 * F32


@dataclass(frozen=True)
class Layout:
    """How ranks are divided; the rest is data parallel and sharded (FSDP), in `replicate` copies (HSDP)."""

    gpus: int
    pp: int = 1
    tp: int = 1
    ep: int = 1
    replicate: int = 1
    chunks: int = 1  # runs of layers a rank, interleaved when above 1
    micro_batch: int = 1  # sequences
    recompute: bool = True  # only layers' inputs are kept, and each layer runs again in the backward pass
    once_a_node: bool = False  # rows cross the network once a node, not once a rank, as DeepEP does

    @property
    def data(self):
        return self.gpus // (self.pp * self.tp)

    @property
    def shard(self):
        return self.data // self.replicate

    def __str__(self):
        parts = [f"{name} {size}" for name, size in (("PP", self.pp), ("TP", self.tp), ("EP", self.ep)) if size > 1]
        parts += [f"HSDP {self.replicate} x {self.shard}" if self.replicate > 1 else f"FSDP {self.shard}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Workload:
    """A step."""

    sequences: int = 512
    tokens: int = 4096  # a sequence


@dataclass(frozen=True)
class Estimate:
    """What a layout takes; times are seconds a step, memory bytes a GPU."""

    layout: Layout
    memory: dict
    times: dict
    tokens_per_gpu: float
    model_flops: float  # FLOP/s a GPU

    @property
    def bytes(self):
        return sum(self.memory.values())

    @property
    def seconds(self):
        return sum(self.times.values())


def collective(size, ranks, in_node, gpu):
    """Seconds of an all-gather or reduce-scatter of `size` bytes, of whose ranks `in_node` share a node.

    Every byte enters a node once, over the adapters of the group's ranks there, and goes to its ranks by NVLink.
    """
    if ranks <= 1:
        return 0.0
    nodes = -(-ranks // in_node)
    inside = size * (in_node - 1) / in_node / gpu.nvlink
    between = size * (nodes - 1) / nodes / (in_node * gpu.network)
    return max(inside, between) / LINK


def all_to_all(rows, row_bytes, choices, ranks, in_node, once_a_node, gpu):
    """Seconds to send each row to every rank with one of its experts; its `choices` experts fall on ranks at random."""
    if ranks <= 1:
        return 0.0

    def reached(places):
        """Places, other than this one, with at least one expert of a row."""
        return (places - 1) * (1 - (1 - 1 / places) ** choices)

    in_all, nodes = reached(ranks), ranks / in_node
    outside = reached(nodes) if once_a_node else in_all * (ranks - in_node) / (ranks - 1)
    inside = in_all if once_a_node else in_all - outside
    return rows * row_bytes * max(inside / gpu.nvlink, outside / gpu.network) / LINK


def estimate(model: Model, layout: Layout, gpu: Gpu, work: Workload = Workload()):
    """The estimate, or a sentence why the layout is not possible."""
    pp, tp, ep, shard = layout.pp, layout.tp, layout.ep, layout.shard
    for what, size, divisor, by in (
        ("the GPUs", layout.gpus, pp * tp * layout.replicate, "pp * tp * replicate"),
        ("the sharded ranks", shard, ep, "ep"),
        ("n_routed_experts", model.n_routed_experts, ep, "ep"),
        ("num_attention_heads", model.num_attention_heads, tp, "tp"),
        ("the sequences", work.sequences, layout.data * layout.micro_batch, "data ranks * micro-batch"),
    ):
        if size % divisor:
            return f"{what} {size} are not divisible by {by} = {divisor}"
    if model.num_hidden_layers < pp * layout.chunks:
        return f"{model.num_hidden_layers} layers are fewer than the {pp * layout.chunks} stages"

    layers = model.num_hidden_layers / pp
    mixture = model.mixture_layers / pp
    micro_batches = work.sequences // (layout.data * layout.micro_batch)
    rows = layout.micro_batch * work.tokens
    node = gpu.per_node
    in_node = {
        "tp": min(tp, node),
        "ep": max(1, min(ep, node // tp)),
        "shard": max(1, min(shard, node // tp)),
        "expert_shard": max(1, min(shard // ep, node // (tp * ep))),
    }

    # Parameters of a rank before sharding over data.
    beside = (mixture * model.beside_experts + model.first_k_dense_replace / pp * model.dense_layer) / tp
    # Embedding and head are whole on the first and the last stage; both on one rank without a pipeline.
    ends = model.vocab_size * model.hidden_size * (2 if pp == 1 else 1) + model.vision_parameters
    experts = mixture * model.experts / (tp * ep)
    held = (beside + ends) / shard + experts / (shard // ep)

    in_flight = pp if layout.chunks == 1 else (2 * (pp - 1) + (layout.chunks - 1) * pp + 1) / layout.chunks
    in_flight = min(in_flight, micro_batches)
    gathered = (model.beside_experts / tp + model.experts / (tp * ep)) * BF16
    # Where a pipeline keeps the gathered experts between micro-batches instead, see docs/scaling.md.
    memory = {
        "states": held * STATE_BYTES,
        "gathered layers": 0.0 if shard == 1 else 2 * gathered + (ends * BF16 if shard > 1 else 0),
        "layer gradients": gathered / BF16 * F32 if shard > 1 else 0.0,
        "layer inputs": layers * in_flight * rows * (model.hidden_size * BF16 if layout.recompute else model.working_set()),
        "working set": rows * model.working_set() + rows * model.hidden_size * F32,
        "reserved": RESERVED,
    }

    # Computing: forward, forward again where it is recomputed, and backward twice the forward.
    passes = 4 if layout.recompute else 3
    expert_flops = passes * mixture * model.expert_flops() / tp
    attention_flops = passes * layers * model.attention_flops(work.tokens) / tp
    dense = 2 * (model.active - model.vocab_size * model.hidden_size) - model.mixture_layers * model.expert_flops()
    head = 3 * 2 * model.vocab_size * model.hidden_size
    dense_flops = passes * dense / (pp * tp) + head / (1 if pp == 1 else pp)
    # Elementwise work streams a layer's working set about twice a pass.
    streamed = passes * 2 * layers * model.working_set() / tp
    per_row = expert_flops / (gpu.flops * GROUPED) + attention_flops / (gpu.flops * ATTENTION)
    per_row += dense_flops / (gpu.flops * DENSE) + streamed / (gpu.hbm * STREAM)
    compute = micro_batches * rows * per_row

    # Parameters are gathered for the forward and the backward pass of each micro-batch; gradients are summed once a step.
    gather = collective(BF16 * (beside + ends), shard, in_node["shard"], gpu)
    gather += collective(BF16 * experts, shard // ep, in_node["expert_shard"], gpu)
    reduce = collective(F32 * (beside + ends), shard, in_node["shard"], gpu)
    reduce += collective(F32 * experts, shard // ep, in_node["expert_shard"], gpu)
    copies = 2 * collective(F32 * held, layout.replicate, 1, gpu)
    sharding = 2 * micro_batches * gather + reduce + copies

    # Dispatch and combine in each pass. The ranks of a tensor group all dispatch the same rows.
    row_bytes = model.hidden_size * BF16
    choices = model.num_experts_per_tok
    exchange = all_to_all(rows, row_bytes, choices, ep, in_node["ep"], layout.once_a_node, gpu)
    exchange = micro_batches * mixture * 2 * (passes - 1) * exchange

    # Two sums of hidden states in each pass over a layer, each a reduce-scatter and an all-gather.
    sums = 2 * collective(rows * row_bytes, tp, in_node["tp"], gpu)
    sums = micro_batches * layers * 2 * (passes - 1) * sums

    bubble = (pp - 1) / (layout.chunks * micro_batches) * (compute + exchange + sums)
    optimizer = held * OPTIMIZER_BYTES / (gpu.hbm * STREAM)
    times = {
        "compute": compute,
        "expert exchange": exchange,
        "tensor sums": sums,
        "sharding": max(sharding - OVERLAP * compute, (1 - OVERLAP) * sharding),
        "bubble": bubble,
        "optimizer": optimizer,
    }
    seconds = sum(times.values())
    tokens = work.sequences * work.tokens / layout.gpus / seconds
    return Estimate(layout, memory, times, tokens, tokens * model.flops(work.tokens))
