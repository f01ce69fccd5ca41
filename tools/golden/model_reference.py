"""Runs transformers on a checkpoint, and collects what `mistral4 forward` writes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.models.mistral4 import modeling_mistral4 as mistral4

ATTENTION = "eager"
EXPERTS = "eager"


def load(folder: Path, policy: str, changes: dict, dtype=torch.float32, attention=ATTENTION, experts=EXPERTS):
    """The model of a folder in transformers, with the softmax scale of `policy`.

    `changes` are the deviations of a case: a `llama_4_scaling_beta`, `rope_attention_scaling` or
    `rotate_rope_part_only`. Fails on a missing or an unexpected key.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    if "llama_4_scaling_beta" in changes:
        text_config.rope_parameters["llama_4_scaling_beta"] = changes["llama_4_scaling_beta"]
    rotate_all = mistral4.Mistral4RotaryEmbedding.compute_default_rope_parameters
    if changes.get("rotate_rope_part_only"):
        mistral4.Mistral4RotaryEmbedding.compute_default_rope_parameters = staticmethod(rotate_rope_part)
    model, report = family_of(config).from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        experts_implementation=experts,
        output_loading_info=True,
    )
    mistral4.Mistral4RotaryEmbedding.compute_default_rope_parameters = staticmethod(rotate_all)
    problems = {kind: list(keys) for kind, keys in report.items() if keys}
    if problems:
        raise ValueError(f"transformers loads {folder} with problems: {problems}")
    decoder = decoder_of(model)
    for layer in decoder.layers:
        attention_module = layer.self_attn
        if policy == "standard":
            attention_module.scaling = attention_module.qk_head_dim**-0.5
    if "rope_attention_scaling" in changes:
        decoder.rotary_emb.attention_scaling = changes["rope_attention_scaling"]
    return model.eval()


def family_of(config) -> type:
    """The model class; transformers 5.24 lists no automatic class for a text-only `mistral4`."""
    if config.model_type == "mistral3":
        return transformers.Mistral3ForConditionalGeneration
    return transformers.Mistral4ForCausalLM


def rotate_rope_part(config, **_):
    """Default rotary frequencies over `qk_rope_head_dim`, where transformers takes the whole head."""
    steps = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float)
    return 1.0 / config.rope_parameters["rope_theta"] ** (steps / config.qk_rope_head_dim), 1.0


def decoder_of(model) -> mistral4.Mistral4Model:
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


def routing_margin(model, inputs: dict[str, torch.Tensor]) -> float:
    """How far, in router scores, the nearest different choice of experts or groups is.

    Padded positions do not count.
    """
    margins, handles = [], []
    keep = inputs["attention_mask"].flatten().bool() if "attention_mask" in inputs else slice(None)

    def observe(router, _, output):
        scores = output[0].detach().float().softmax(-1)[keep]
        per_group = router.num_experts // router.num_group
        if router.topk_group < router.num_group:
            groups = scores.view(-1, router.num_group, per_group).topk(2, -1)[0].sum(-1)
            ranked = groups.sort(-1, descending=True)[0]
            margins.append((ranked[:, router.topk_group - 1] - ranked[:, router.topk_group]).min())
            chosen = groups >= ranked[:, router.topk_group - 1 : router.topk_group]
            scores = scores.masked_fill(~chosen.repeat_interleave(per_group, 1), 0.0)
        ranked = scores.sort(-1, descending=True)[0]
        margins.append((ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min())

    for module in model.modules():
        if isinstance(module, mistral4.Mistral4TopkRouter):
            handles.append(module.register_forward_hook(observe))
    with torch.no_grad():
        forward(model, inputs)
    for handle in handles:
        handle.remove()
    return min(map(float, margins), default=1.0)


def with_mask(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arguments for transformers, with a mask where the prompt has none.

    Without a mask transformers takes a jump in `position_ids` for the start of another sequence
    and cuts attention there.
    """
    arguments = {"attention_mask": torch.ones_like(inputs["input_ids"])} | inputs
    return {key: value for key, value in arguments.items() if key != "labels"}


def forward(model, inputs: dict[str, torch.Tensor]):
    """Logits `[B, S, V]` (or `[T, V]`) and hidden states; a packed prompt runs sequence by sequence."""
    if "cu_seqlens" not in inputs:
        output = model(**with_mask(inputs), output_hidden_states=True, use_cache=False)
        return output.logits, output.hidden_states
    bounds = inputs["cu_seqlens"].tolist()
    runs = [
        model(input_ids=inputs["input_ids"][None, begin:end], output_hidden_states=True, use_cache=False)
        for begin, end in zip(bounds, bounds[1:])
    ]
    logits = torch.cat([run.logits[0] for run in runs])
    hidden = [torch.cat([state[0] for state in states]) for states in zip(*(run.hidden_states for run in runs))]
    return logits, hidden


def token_mean_loss(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy over all labels, each predicted from the position before it in its sequence."""
    labels = inputs["labels"]
    if "cu_seqlens" in inputs:
        labels = labels.clone()
        labels[inputs["cu_seqlens"][:-1]] = -100
        logits, labels = logits[None], labels[None]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@torch.no_grad()
def greedy(model, inputs: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, float]:
    """`count` greedy tokens a row with the cache, and the smallest lead of a chosen token's logit."""
    ids, mask = inputs["input_ids"], with_mask(inputs)["attention_mask"]
    positions = inputs.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **images)
    chosen, lead = [], float("inf")
    for step in range(count):
        best = output.logits[:, -1].float().topk(2, -1)
        lead = min(lead, float((best.values[:, 0] - best.values[:, 1]).min()))
        chosen.append(best.indices[:, 0])
        if step + 1 < count:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            positions = positions[:, -1:] + 1
            output = model(
                input_ids=chosen[-1][:, None],
                attention_mask=mask,
                position_ids=positions,
                cache=output.cache,
                use_cache=True,
            )
    return torch.stack(chosen, 1), lead


def outputs(model, inputs, key_of, gradients: bool, greedy_tokens: int) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors of `forward`'s OUT file, and the lead of the greedy tokens."""
    model.zero_grad()
    logits, hidden = forward(model, inputs)
    loss = token_mean_loss(logits, inputs)
    result = {"logits": logits, "loss": loss}
    result |= {f"hidden_states.{index}": state for index, state in enumerate(hidden)}
    if gradients:
        loss.backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            result[f"grad.{key_of(name)}"] = torch.zeros_like(parameter) if gradient is None else gradient
    result = {key: value.detach().float().contiguous() for key, value in result.items()}
    lead = float("inf")
    if greedy_tokens:
        result["greedy"], lead = greedy(model, inputs, greedy_tokens)
    if "attention_mask" in inputs:
        result["compare_mask"] = inputs["attention_mask"].clone()
    return result, lead


def expectations_hold(model, inputs: dict[str, torch.Tensor]) -> None:
    """Asserts that our loss is transformers' own, where transformers can compute it."""
    if "cu_seqlens" not in inputs:
        with torch.no_grad():
            theirs = model(**with_mask(inputs), labels=inputs["labels"], use_cache=False).loss
        torch.testing.assert_close(theirs, token_mean_loss(forward(model, inputs)[0], inputs), rtol=1e-5, atol=1e-6)
