"""Loads an adapter in the `peft` library over transformers' model, and compares its logits with those of `mistral4 forward`.

    python check_in_peft.py BASE_DIR ADAPTER_DIR --binary path/to/mistral4 [--merged MERGED_DIR]

Fails when peft misses a tensor of the adapter, finds one it does not know, or disagrees on the logits; with --merged also
when transformers disagrees about what `mistral4 merge` wrote. Needs the packages of golden/requirements.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))
import model_reference as reference
from check_in_transformers import load, prompt
from compare import relative_error

TOLERANCE = 1e-4


def ours(binary: Path, base: Path, adapter: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits that `mistral4 forward --adapter` writes."""
    with tempfile.TemporaryDirectory() as scratch:
        given, output = Path(scratch) / "in.safetensors", Path(scratch) / "out.safetensors"
        save_file(inputs, given)
        command = [binary, "forward", "--model", base, "--adapter", adapter, "--inputs", given, "--outputs", output]
        subprocess.run([*command, "--dtype", "f32", "--softmax-scale", "standard"], check=True, stdout=subprocess.DEVNULL)
        return load_file(output)["logits"]


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return reference.forward(model, inputs)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--merged", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, _ = load(arguments.base, "standard")
    inputs = prompt(arguments.base)
    plain = logits(model, inputs)
    print(f"peft {peft.__version__}, transformers {transformers.__version__}, {type(model).__name__}")
    model = get_peft_model(model, PeftConfig.from_pretrained(arguments.adapter))
    stored = load_file(arguments.adapter / "adapter_model.safetensors")
    report = set_peft_model_state_dict(model, stored)
    missing = [key for key in report.missing_keys if "lora" in key]
    print(f"adapter tensors: {len(stored)}, missing: {len(missing)}, unexpected: {len(report.unexpected_keys)}")
    theirs = logits(model.eval(), inputs)
    change, _ = relative_error(theirs, plain)
    error, norm = relative_error(ours(arguments.binary, arguments.base, arguments.adapter, inputs), theirs)
    print(f"the adapter changes the logits by {change:.1e}")
    print(f"logits: norm {norm:.4e}, relative error {error:.1e}, at most {TOLERANCE:.0e}")
    failed = bool(missing or report.unexpected_keys) or not error <= TOLERANCE
    if arguments.merged:
        error, _ = relative_error(logits(load(arguments.merged, "standard")[0], inputs), theirs)
        print(f"merged, in transformers: relative error {error:.1e}")
        failed |= not error <= TOLERANCE
    print("FAILED" if failed else "ok")
    sys.exit(failed)


if __name__ == "__main__":
    main()
