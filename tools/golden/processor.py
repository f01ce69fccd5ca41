"""Writes the golden fixtures of the tokenizer and the chat form with mistral_common.

Pinned: mistral_common 1.13.1, tiktoken 0.14.0, pillow 13.0.0, transformers 5.24.0, tokenizers as it asks for. The output is deterministic.

    python tools/golden/processor.py                        # tests/golden/processor, a vocabulary cut to VOCAB ranks
    python tools/golden/processor.py --full --out DIR       # the same cases over the full vocabulary, not committed

The second form writes DIR/tekken.json; run the tests over it with MISTRAL4_PROCESSOR_GOLDENS=DIR.

Files: `tekken.json` (a v15 file; tests change its version), `tokenizer.json` (the same vocabulary as transformers converts
it), `strings.json`, `conversations.json`. Where Hugging Face's tokenizer gives other ids than tekken, `hf_ids` holds them.
"""

import argparse
import base64
import io
import json
import random
import tempfile
import warnings
from pathlib import Path

import mistral_common
import numpy as np
from PIL import Image

warnings.filterwarnings("ignore")

import mistral_common.tokens.tokenizers.image as image_module
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.integrations.mistral.tokenizer import MistralConverter

from processor_cases import conversations, strings

FORMAT_VERSION = 1
VOCAB = 4000
VERSIONS = ["v3", "v7", "v11", "v13", "v15"]
FIXED = [
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
]
NAMED = ["[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"]
REFUSALS = {
    "InvalidMessageStructureException": "MessageStructure",
    "InvalidUserMessageException": "UserMessage",
    "InvalidAssistantMessageException": "AssistantMessage",
    "InvalidToolMessageException": "ToolMessage",
    "InvalidSystemPromptException": "SystemPrompt",
    "InvalidToolException": "Tool",
    "InvalidToolSchemaException": "ToolSchema",
    "InvalidFunctionCallException": "FunctionCall",
    "InvalidRequestException": "Request",
}

# The pixels are not part of these goldens, so the resizing (which needs OpenCV) is left out.
image_module.transform_image = lambda image, size: np.zeros((3, size[1], size[0]), dtype=np.float32)


def v15_file(full):
    source = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    data = json.loads(source.read_text(encoding="utf-8"))
    names = FIXED + [f"<SPECIAL_{i}>" for i in range(len(FIXED), 32)] + NAMED
    data["config"]["version"] = "v15"
    if not full:
        data["vocab"] = data["vocab"][:VOCAB]
        data["config"].update(num_vocab_tokens=VOCAB, default_num_special_tokens=40, default_vocab_size=VOCAB + 40)
    data["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    data["image"] = {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2}
    data["model_settings_builder"] = {
        "reasoning_effort": {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
    }
    return data


def tokenizers(data, folder):
    """A tokenizer for every version and mode, from the same vocabulary."""
    found = {}
    for version in VERSIONS:
        changed = {**data, "config": {**data["config"], "version": version}}
        if version != "v15":
            changed.pop("model_settings_builder")
        path = Path(folder) / f"tekken_{version}.json"
        path.write_text(json.dumps(changed), encoding="utf-8")
        for mode in ["test", "finetuning"]:
            found[version, mode] = MistralTokenizer.from_file(path, ValidationMode(mode))
    return found


def fnv(ids):
    """FNV-1a, 64 bits, over the little-endian bytes of u32 ids."""
    value = 0xCBF29CE484222325
    for byte in np.array(ids, dtype="<u4").tobytes():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def png_url(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def with_images(request, sizes):
    """The request with every bare image part filled in, as mistral_common wants it."""
    left = list(sizes)

    def fill(value):
        if isinstance(value, dict) and value.get("type") == "image" and len(value) == 1:
            return {"type": "image_url", "image_url": {"url": png_url(*left.pop(0))}}
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        return value

    filled = fill(request)
    assert not left, "every size belongs to an image part"
    return filled


def expectation(tokenizer, request, sizes):
    filled = with_images(request, sizes)
    body = {"messages": filled} if isinstance(filled, list) else filled
    try:
        chat = ChatCompletionRequest.from_openai(**body)
    except MistralCommonException as error:
        return {"refused": REFUSALS[type(error).__name__], "reason": error.message}
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        return {"refused": "Malformed", "reason": str(error).split("\n")[0]}
    try:
        return {"ids": tokenizer.encode_chat_completion(chat).tokens}
    except MistralCommonException as error:
        return {"refused": REFUSALS.get(type(error).__name__, "ChatForm"), "reason": error.message}
    except (ValueError, AssertionError) as error:
        return {"refused": "ChatForm", "reason": str(error)}


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "tests" / "golden" / "processor")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = v15_file(arguments.full)
    write(arguments.out / "tekken.json", data)
    with tempfile.TemporaryDirectory() as folder:
        found = tokenizers(data, folder)
    origin = {"format_version": FORMAT_VERSION, "mistral_common": mistral_common.__version__}

    tekken = found["v15", "test"].instruct_tokenizer.tokenizer
    converted = MistralConverter(vocab_file=str(arguments.out / "tekken.json")).converted()
    converted.save(str(arguments.out / "tokenizer.json"), pretty=False)
    converted.encode_special_tokens = True
    cases, different = [], 0
    for text, times in strings(random.Random(4)):
        ids = tekken.encode(text * times, bos=False, eos=False)
        case = {"text": text}
        if times > 1:
            case["times"] = times
        case.update({"ids": ids} if len(ids) <= 300 else {"count": len(ids), "fnv": fnv(ids)})
        hf_ids = converted.encode(text * times, add_special_tokens=False).ids
        if hf_ids != ids:
            different += 1
            case["hf_ids"] = hf_ids
        cases.append(case)
    print(len(cases), "strings,", different, "with other ids in tokenizer.json")
    write(arguments.out / "strings.json", {**origin, "cases": cases})

    cases = []
    for case in conversations(random.Random(15)):
        for version in case.pop("versions"):
            expected = expectation(found[version, case["mode"]], case["request"], case["images"])
            cases.append({"version": version, **case, **expected})
    write(arguments.out / "conversations.json", {**origin, "cases": cases})
    refused = [case for case in cases if "refused" in case]
    print(len(cases), "conversations,", len(refused), "refused")
    counts = {}
    for case in refused:
        counts[case["refused"]] = counts.get(case["refused"], 0) + 1
    print(counts)


if __name__ == "__main__":
    main()
