"""Checks the simulator: parameter counts, arithmetic, and published throughput. Exits 1 when something is off."""

import sys

import model as models
from estimate import H100, H200, Estimate, Layout, Workload, estimate

# NeMo AutoModel, docs/performance-summary.mdx of 2025-10-02: DGX H100, bf16, 4096 tokens, balanced routing.
PUBLISHED = [
    (models.QWEN3_30B, Layout(8, ep=8, micro_batch=4), 512, 12040, 277),
    (models.GPT_OSS_120B, Layout(64, ep=64, micro_batch=2, recompute=False, once_a_node=True), 512, 7626, 231),
    (models.DEEPSEEK_V3, Layout(256, pp=4, ep=64, chunks=8, once_a_node=True), 512, 1002, 250),
    (models.DEEPSEEK_V3, Layout(1024, pp=4, ep=64, chunks=8, once_a_node=True), 8192, 865, 216),
    (models.KIMI_K2, Layout(256, pp=8, ep=32, chunks=4, once_a_node=True), 512, 924, 189),
]


def published():
    """Rows of (model, layout, published and estimated tokens/s a GPU)."""
    for model, layout, sequences, tokens, tflops in PUBLISHED:
        result = estimate(model, layout, H100, Workload(sequences))
        assert isinstance(result, Estimate), result
        yield model, layout, tokens, result, tflops


def main():
    for model, total, active in (
        (models.MISTRAL_SMALL_4, 119e9, 6.5e9),
        (models.DEEPSEEK_V3, 671e9, 37e9),
        (models.KIMI_K2, 1.03e12, 32e9),
        (models.QWEN3_30B, 30.5e9, 3.3e9),
        (models.GPT_OSS_120B, 117e9, 5.1e9),
    ):
        print(f"{model.name}: {model.total / 1e9:.1f} B, {model.active / 1e9:.2f} B active")
        assert abs(model.total / total - 1) < 0.02, (model.name, model.total)
        assert abs(model.active / active - 1) < 0.15, (model.name, model.active)
    # Sharding all states over twice the ranks halves them; a replica more does not change them.
    a = estimate(models.MISTRAL_SMALL_4, Layout(64), H200)
    b = estimate(models.MISTRAL_SMALL_4, Layout(128), H200)
    c = estimate(models.MISTRAL_SMALL_4, Layout(128, replicate=2), H200)
    assert abs(a.memory["states"] / b.memory["states"] - 2) < 1e-9
    assert abs(a.memory["states"] / c.memory["states"] - 1) < 1e-9
    assert "n_routed_experts 128" in estimate(models.MISTRAL_SMALL_4, Layout(96, ep=3), H100)
    for model, layout, tokens, result, tflops in published():
        # The published numbers count the model's FLOPs as here.
        assert abs(result.model_flops / result.tokens_per_gpu * tokens / 1e12 / tflops - 1) < 0.15, model.name
        ratio = result.tokens_per_gpu / tokens
        print(f"{model.name} on {layout.gpus} ({layout}): published {tokens}, estimated {result.tokens_per_gpu:.0f} tokens/s a GPU, {ratio:.2f}")
        print({k: round(v, 2) for k, v in result.times.items()}, {k: round(v / 1e9, 1) for k, v in result.memory.items()})
        assert 0.7 < ratio < 1.4, model.name


if __name__ == "__main__":
    sys.exit(main())
