"""Loads a checkpoint in transformers, and compares its logits with those of `mistral4 forward`.

    python check_in_transformers.py MODEL_DIR --binary path/to/mistral4
    python check_in_transformers.py MODEL_DIR --inputs IN.safetensors --outputs OUT.safetensors

Fails when transformers misses a key, finds one it does not know, or disagrees on the logits.
The first form makes a prompt that fits the model (with two images for a multimodal one) and runs the
binary on it; the second takes a prompt and the tensors that `forward` wrote for it.
Needs the packages of golden/requirements.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))
import model_reference as reference
from compare import TOLERANCE, relative_error
from model_inputs import make_inputs


def dequantized(folder: Path, scratch: Path) -> None:
    """Writes an FP8 checkpoint in float32, as value times scale.

    transformers 5.24 itself leaves the scales of fused experts aside on the CPU, and takes a block of
    a ragged matrix for smaller than 128.
    """
    config = json.loads((folder / "config.json").read_text())
    block = (config.pop("quantization_config")["weight_block_size"] or [None])[0]
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    plain = {}
    for key, value in tensors.items():
        if key.endswith(("_scale_inv", "activation_scale")):
            continue
        scale = tensors.get(f"{key}_scale_inv")
        if scale is not None and scale.dim() == 2:
            scale = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: value.shape[0], : value.shape[1]]
        plain[key] = value.float() if scale is None else value.float() * scale.float()
    save_file(plain, scratch / "model.safetensors", metadata={"format": "pt"})
    (scratch / "config.json").write_text(json.dumps(config))


def load(folder: Path, policy: str):
    """The model in float32; and what transformers says about its keys."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        source = folder
        if getattr(config, "quantization_config", None):
            print("FP8: dequantised before transformers loads it")
            source = Path(scratch)
            dequantized(folder, source)
        model, report = reference.family_of(config).from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    if policy == "standard":
        for layer in reference.decoder_of(model).layers:
            layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    return model.eval(), report


def ours(binary: Path, folder: Path, policy: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `mistral4 forward` writes for the prompt, in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        prompt, output = Path(scratch) / "in.safetensors", Path(scratch) / "out.safetensors"
        save_file(inputs, prompt)
        command = [binary, "forward", "--model", folder, "--inputs", prompt, "--outputs", output]
        subprocess.run([*command, "--dtype", "f32", "--softmax-scale", policy], check=True)
        return load_file(output)


def prompt(folder: Path) -> dict[str, torch.Tensor]:
    """A prompt that fits the model of a folder, with two images for a multimodal one."""
    config = json.loads((folder / "config.json").read_text())
    return make_inputs("two_images" if config["model_type"] == "mistral3" else "two_rows", config, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--binary", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--outputs", type=Path)
    parser.add_argument("--policy", choices=["standard", "yarn-mscale"], default="standard")
    options = parser.parse_args()
    if bool(options.binary) == bool(options.inputs and options.outputs):
        parser.error("give either --binary, or --inputs and --outputs")
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, report = load(options.folder, options.policy)
    print(f"transformers {transformers.__version__}, {type(model).__name__}, policy {options.policy}")
    print(f"parameters: {sum(parameter.numel() for parameter in model.parameters())}")
    failed = False
    for kind, keys in sorted(report.items()):
        print(f"{kind}: {len(keys)}")
        for key in sorted(map(str, keys)):
            print(f"  {key}")
        failed |= bool(keys)

    if options.binary:
        inputs = prompt(options.folder)
        theirs = ours(options.binary.resolve(), options.folder, options.policy, inputs)
    else:
        inputs, theirs = load_file(options.inputs), load_file(options.outputs)
    with torch.no_grad():
        logits, _ = reference.forward(model, inputs)
    written = theirs["logits"]
    if written.shape != logits.shape:
        print(f"logits: shape {list(written.shape)}, transformers has {list(logits.shape)}")
        sys.exit(1)
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"].bool()
        written, logits = written[mask], logits[mask]
    error, norm = relative_error(written, logits)
    agree = bool((written.argmax(-1) == logits.argmax(-1)).all())
    print(f"logits: shape {list(theirs['logits'].shape)}, norm {norm:.4e}")
    print(f"logits: relative error {error:.1e}, at most {TOLERANCE['f32']:.0e}; same argmax everywhere: {agree}")
    failed |= not error <= TOLERANCE["f32"]
    print("FAIL" if failed else "ok")
    sys.exit(failed)


if __name__ == "__main__":
    main()
