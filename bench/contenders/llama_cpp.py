"""llama.cpp through llama-cpp-python's bindings, on a GGUF file with random weights."""

from __future__ import annotations

import ctypes
import json
import random
import time
from pathlib import Path

import gguf_of_shape
import llama_cpp

FLASH = {"on": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}


@llama_cpp.llama_log_callback
def _only_errors(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    # ggml's levels: 4 is an error; the callback must outlive the library's use of it.
    if level == 4:
        print(text.decode(errors="replace"), end="", flush=True)


class Runner:
    """One file in one context."""

    versions = {"llama-cpp-python": llama_cpp.__version__}

    def __init__(self, spec: dict):
        llama_cpp.llama_log_set(_only_errors, ctypes.c_void_p())
        path = _file(Path(spec["config"]), spec["format"], spec["head_format"], Path(spec["cache"]))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp did not load {path}")
        settings = llama_cpp.llama_context_default_params()
        self.tokens, self.new_tokens = spec["tokens"], spec["new_tokens"]
        settings.n_ctx = self.tokens + self.new_tokens
        settings.n_batch = settings.n_ubatch = self.tokens
        settings.n_threads = settings.n_threads_batch = spec["threads"]
        settings.flash_attn_type = FLASH[spec["flash"]]
        settings.no_perf = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        draw = random.Random(0)
        self.ids = [draw.randrange(16, vocabulary) for _ in range(self.tokens + self.new_tokens)]

    def run(self, mode: str, _variant: str) -> float:
        """Tokens a second."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        self._read(self.ids[: self.tokens])
        if mode == "prefill":
            return self.tokens / (time.perf_counter() - start)
        start = time.perf_counter()
        for token in self.ids[self.tokens :]:
            self._read([token])
        return self.new_tokens / (time.perf_counter() - start)

    def _read(self, ids: list[int]) -> None:
        """Appends tokens to the cache; logits of the last one."""
        # The batch points into this array and doesn't keep it alive.
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        if not llama_cpp.llama_get_logits_ith(self.context, -1):
            raise RuntimeError("llama.cpp gave no logits")


def _file(config: Path, format: str, head_format: str, cache: Path) -> Path:
    """The file of a shape, written where it is not yet there."""
    path = cache / f"{config.stem}-{format}-head-{head_format}.gguf"
    if not path.exists() or path.stat().st_mtime < config.stat().st_mtime:
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        gguf_of_shape.write(json.loads(config.read_text()), unfinished, format, head_format)
        unfinished.rename(path)
    return path
