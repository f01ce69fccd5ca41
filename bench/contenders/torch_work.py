"""What transformers and NeMo AutoModel are both asked to do."""

from __future__ import annotations

import time

import torch

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class TorchWork:
    """A model with a row of random tokens for each of `batch`; subclasses say how the model is called."""

    def __init__(self, model: torch.nn.Module, spec: dict, vocabulary: int):
        self.model = model
        self.batch, self.tokens, self.new_tokens = spec["batch"], spec["tokens"], spec["new_tokens"]
        ids = torch.randint(16, vocabulary, (self.batch, self.tokens + self.new_tokens))
        self.ids, self.next_ids = ids[:, : self.tokens], ids[:, self.tokens :]
        if spec["mode"].startswith("train"):
            # Updates parameters in place, with moments in their number format.
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.model.train(spec["mode"].startswith("train"))

    def run(self, mode: str, variant: str) -> float:
        """Tokens a second."""
        self.choose(variant)
        if mode.startswith("train"):
            return self._train()
        with torch.inference_mode():
            return self.prefill() if mode == "prefill" else self.decode()

    def choose(self, variant: str) -> None:
        """Takes a way to compute, where a model has many."""

    def prefill(self) -> float:
        raise NotImplementedError

    def decode(self) -> float:
        raise NotImplementedError

    def loss(self) -> torch.Tensor:
        raise NotImplementedError

    def _train(self) -> float:
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.ids.numel() / (time.perf_counter() - start)
