"""NeMo AutoModel's Mistral 4 on one process; it keeps no cache of keys and values, so it does not decode."""

from __future__ import annotations

import time

import torch
import transformers
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.mistral4.model import Mistral4ForCausalLM

from .torch_work import DTYPES, TorchWork

try:
    from nemo_automodel.package_info import __version__ as NEMO_VERSION
except ImportError:
    NEMO_VERSION = "unknown"


class Runner(TorchWork):
    """One model for one way to compute experts, which is fixed when it is made."""

    versions = {"nemo_automodel": NEMO_VERSION, "torch": torch.__version__}

    def __init__(self, spec: dict):
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        dtype = DTYPES[spec["format"]]
        config = transformers.Mistral4Config.from_json_file(spec["config"])
        config.dtype = dtype
        # Everything but the experts has one choice that runs on CPUs.
        backend = BackendConfig(
            attn="sdpa", linear="torch", rms_norm="torch_fp32", experts=spec["variant"], dispatcher="torch"
        )
        with torch.device("meta"):
            model = Mistral4ForCausalLM(config, backend=backend)
        model.to_empty(device="cpu")
        model.initialize_weights(buffer_device=torch.device("cpu"), dtype=dtype)
        self.cross_entropy = MaskedCrossEntropy()
        super().__init__(model, spec, config.vocab_size)

    def prefill(self) -> float:
        start = time.perf_counter()
        self.model(self.ids, logits_to_keep=1)
        return self.ids.numel() / (time.perf_counter() - start)

    def loss(self) -> torch.Tensor:
        labels = self.ids.roll(-1, 1)
        return self.cross_entropy(self.model(self.ids).logits, labels, num_label_tokens=labels.numel())
