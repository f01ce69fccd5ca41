"""Writes tests/golden/checkpoint/packed.safetensors: weights packed, and unpacked again, by the compressed-tensors library.

Versions: see requirements.txt. Deterministic; `python tools/golden/packed.py` writes the same bytes each time.
"""

from pathlib import Path

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "checkpoint" / "packed.safetensors"


def main():
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for bits in (4, 8):
        for symmetric in (True, False):
            for rows, columns, group_size in ((13, 96, 32), (24, 256, 128)):
                name = f"int{bits}_{'symmetric' if symmetric else 'asymmetric'}_{group_size}"
                args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=group_size)
                scheme = QuantizationScheme(targets=["Linear"], weights=args)
                weight = torch.randn(rows, columns, generator=generator) + 0.5
                groups = weight.reshape(rows, -1, group_size)
                scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
                state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero.to(torch.int8)}
                packed = PackedQuantizationCompressor.compress(state, scheme)
                restored = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
                tensors |= {f"{name}.{key}": value.contiguous() for key, value in packed.items()}
                tensors[f"{name}.expected"] = restored.bfloat16().contiguous()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)


if __name__ == "__main__":
    main()
