"""transformers, with `sdpa` attention and a choice of how to compute experts."""

from __future__ import annotations

import time

import torch
import transformers

from .torch_work import DTYPES, TorchWork

transformers.logging.set_verbosity_error()


class Runner(TorchWork):
    """One model for all ways to compute experts."""

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def __init__(self, spec: dict):
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        config = transformers.Mistral4Config.from_json_file(spec["config"])
        torch.set_default_dtype(DTYPES[spec["format"]])
        model = transformers.Mistral4ForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
        super().__init__(model, spec, config.vocab_size)

    def choose(self, variant: str) -> None:
        self.model.set_experts_implementation(variant)

    def prefill(self) -> float:
        start = time.perf_counter()
        self._read_prompt()
        return self.ids.numel() / (time.perf_counter() - start)

    def decode(self) -> float:
        cache = self._read_prompt().cache
        start = time.perf_counter()
        for position in range(self.new_tokens):
            token = self.next_ids[:, position : position + 1]
            self.model(input_ids=token, cache=cache, use_cache=True)
        return self.next_ids.numel() / (time.perf_counter() - start)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def _read_prompt(self):
        return self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1)
