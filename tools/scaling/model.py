"""Parameters, FLOPs and activation bytes of a mixture-of-experts decoder, from its widths."""

from dataclasses import dataclass

BF16, F32 = 2, 4


@dataclass(frozen=True)
class Model:
    """Widths under the names of `config.json`; `q_lora_rank` 0 means one full query projection."""

    name: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    qk_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    vocab_size: int
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    intermediate_size: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0  # 0: grouped-query attention with num_key_value_heads
    qk_rope_head_dim: int = 0
    num_key_value_heads: int = 0
    vision_parameters: int = 0

    @property
    def attention(self):
        """Parameters of one layer's attention; norms are left out everywhere, they are a few thousandths of a percent."""
        d, n, q, v = self.hidden_size, self.num_attention_heads, self.qk_head_dim, self.v_head_dim
        query = d * self.q_lora_rank + self.q_lora_rank * n * q if self.q_lora_rank else d * n * q
        if self.kv_lora_rank:
            nope = q - self.qk_rope_head_dim
            key_value = d * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank * n * (nope + v)
        else:
            key_value = d * self.num_key_value_heads * (q + v)
        return query + key_value + n * v * d

    @property
    def expert(self):
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def experts(self):
        """Parameters of one layer's routed experts."""
        return self.n_routed_experts * self.expert

    @property
    def beside_experts(self):
        """Parameters of one mixture layer that every token uses: attention, router, shared experts."""
        return self.attention + self.hidden_size * self.n_routed_experts + self.n_shared_experts * self.expert

    @property
    def dense_layer(self):
        """Parameters of one leading dense layer."""
        return self.attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def mixture_layers(self):
        """Layers with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def total(self):
        """All parameters."""
        layers = self.first_k_dense_replace * self.dense_layer
        layers += self.mixture_layers * (self.beside_experts + self.experts)
        return layers + 2 * self.vocab_size * self.hidden_size + self.vision_parameters

    @property
    def active(self):
        """Parameters that take part in a product with each token: the embedding is a look-up."""
        mixture = self.beside_experts + self.num_experts_per_tok * self.expert
        layers = self.first_k_dense_replace * self.dense_layer + self.mixture_layers * mixture
        return layers + self.vocab_size * self.hidden_size

    def attention_flops(self, sequence):
        """Forward FLOPs of scores and sums a token and layer; a causal token sees half the sequence on average."""
        return self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * sequence

    def expert_flops(self):
        """Forward FLOPs of the routed experts a token and mixture layer."""
        return 2 * self.num_experts_per_tok * self.expert

    def flops(self, sequence):
        """Model FLOPs of a training step a token: forward once, backward twice that."""
        forward = 2 * self.active + self.num_hidden_layers * self.attention_flops(sequence)
        return 3 * forward

    def working_set(self):
        """Bytes a token that one layer keeps while it is differentiated, in bf16: inputs and outputs of every product."""
        d, n = self.hidden_size, self.num_attention_heads
        attention = 4 * d + n * (3 * self.qk_head_dim + 3 * self.v_head_dim)
        chosen = self.num_experts_per_tok + self.n_shared_experts
        feed_forward = chosen * (2 * d + 3 * self.moe_intermediate_size)
        return BF16 * (attention + feed_forward)


MISTRAL_SMALL_4 = Model(
    "Mistral Small 4 119B", hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, qk_head_dim=128, v_head_dim=128,
    q_lora_rank=1024, kv_lora_rank=256, qk_rope_head_dim=64, n_routed_experts=128, num_experts_per_tok=4,
    moe_intermediate_size=2048, n_shared_experts=1, vocab_size=131072, vision_parameters=437_000_000,
)
DEEPSEEK_V3 = Model(
    "DeepSeek-V3 671B", hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, qk_head_dim=192, v_head_dim=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, n_routed_experts=256, num_experts_per_tok=8,
    moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=3, intermediate_size=18432, vocab_size=129280,
)
KIMI_K2 = Model(
    "Kimi K2 1T", hidden_size=7168, num_hidden_layers=61, num_attention_heads=64, qk_head_dim=192, v_head_dim=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, n_routed_experts=384, num_experts_per_tok=8,
    moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=1, intermediate_size=18432, vocab_size=163840,
)
QWEN3_30B = Model(
    "Qwen3 MoE 30B", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, qk_head_dim=128, v_head_dim=128,
    num_key_value_heads=4, n_routed_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151936,
)
GPT_OSS_120B = Model(
    "GPT-OSS 120B", hidden_size=2880, num_hidden_layers=36, num_attention_heads=64, qk_head_dim=64, v_head_dim=64,
    num_key_value_heads=8, n_routed_experts=128, num_experts_per_tok=4, moe_intermediate_size=2880, vocab_size=201088,
)
