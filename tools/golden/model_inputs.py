"""The prompts of the model cases: token ids, masks, labels and pixels, as `mistral4 forward` reads them."""

from __future__ import annotations

import torch

IMG, PAD, IMG_BREAK, IMG_END, FIRST_WORD = 10, 11, 12, 13, 16


def words(generator: torch.Generator, vocab: int, *shape: int) -> torch.Tensor:
    """Ordinary tokens: neither control tokens, nor padding, nor image tokens."""
    return torch.randint(FIRST_WORD, vocab, shape, generator=generator)


def text_rows(generator, vocab, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows that begin with BOS, and labels equal to them."""
    ids = words(generator, vocab, rows, length)
    ids[:, 0] = 1
    return {"input_ids": ids, "labels": ids.clone()}


def two_rows(generator, config):
    return text_rows(generator, config["vocab_size"], 2, 12)


def one_row(generator, config):
    return text_rows(generator, config["vocab_size"], 1, 12)


def short_row(generator, config):
    return text_rows(generator, config["vocab_size"], 1, 8)


def long_row(generator, config):
    return text_rows(generator, config["vocab_size"], 1, 40)


def spread_positions(generator, config):
    """Two rows whose positions leap ahead, each row differently."""
    inputs = two_rows(generator, config)
    longest = config["max_position_embeddings"]
    steps = torch.randint(1, longest // 12, (2, 12), generator=generator)
    inputs["position_ids"] = (steps.cumsum(1) - 1).clamp(max=longest - 1)
    return inputs


def padded(inputs: dict[str, torch.Tensor], lengths: list[int], left: bool) -> dict[str, torch.Tensor]:
    """Replaces the front or back of rows by padding, with mask, positions and labels to match.

    Labels are unshifted, so the first real token of a left-padded row gets none: it would be
    predicted from a padded position.
    """
    rows, length = inputs["input_ids"].shape
    mask = torch.zeros(rows, length, dtype=torch.int64)
    for row, real in enumerate(lengths):
        mask[row, slice(length - real, None) if left else slice(real)] = 1
    inputs["input_ids"] = torch.where(mask.bool(), inputs["input_ids"], PAD)
    inputs["labels"] = torch.where(mask.bool(), inputs["labels"], -100)
    inputs["attention_mask"] = mask
    if left:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        for row, real in enumerate(lengths):
            inputs["labels"][row, length - real] = -100
    return inputs


def left_padding(generator, config):
    return padded(two_rows(generator, config), [12, 7], left=True)


def right_padding(generator, config):
    return padded(two_rows(generator, config), [8, 12], left=False)


def labels_ignored(generator, config):
    """A prompt without labels in front, and holes."""
    inputs = two_rows(generator, config)
    inputs["labels"][0, :6] = -100
    inputs["labels"][1, [3, 4, 9]] = -100
    return inputs


def packed(generator, config):
    """Three sequences, one of a single token, laid end to end."""
    lengths = [9, 1, 14]
    row = text_rows(generator, config["vocab_size"], 1, sum(lengths))
    inputs = {name: value[0] for name, value in row.items()}
    inputs["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    inputs["labels"][11] = -100
    return inputs


def image_tokens(height: int, width: int, pixels_per_token: int) -> list[int]:
    """Rows of [IMG] that end in [IMG_BREAK], the last in [IMG_END]."""
    rows, columns = height // pixels_per_token, width // pixels_per_token
    ids = ([IMG] * columns + [IMG_BREAK]) * rows
    ids[-1] = IMG_END
    return ids


def with_images(generator, config, rows: list[list[int | tuple[int, int]]], fill: float = 0.0):
    """Rows made of word counts and of images `(height, width)`, padded on the right to one length.

    Pixels outside an image's own size are set to `fill`; they must not matter.
    """
    pixels_per_token = config["patch_size"] * config["spatial_merge_size"]
    # Sizes are meant for tokens of 8 pixels or fewer; a tower with larger ones gets larger images.
    scale = -(-pixels_per_token // 8)
    rows = [[(part[0] * scale, part[1] * scale) if isinstance(part, tuple) else part for part in row] for row in rows]
    sizes = [part for row in rows for part in row if isinstance(part, tuple)]
    ids = []
    for row in rows:
        tokens = [1]
        for part in row:
            if isinstance(part, tuple):
                tokens += image_tokens(*part, pixels_per_token)
            else:
                tokens += words(generator, config["vocab_size"], part).tolist()
        ids.append(tokens)
    length = max(map(len, ids))
    lengths = [len(row) for row in ids]
    input_ids = torch.tensor([row + [PAD] * (length - len(row)) for row in ids])
    control = (input_ids >= IMG) & (input_ids <= IMG_END)
    inputs = {"input_ids": input_ids, "labels": torch.where(control, -100, input_ids)}
    if min(lengths) < length:
        inputs = padded(inputs, lengths, left=False)
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    pixels = torch.full((len(sizes), 3, height, width), fill)
    for image, (h, w) in enumerate(sizes):
        pixels[image, :, :h, :w] = torch.randn(3, h, w, generator=generator)
    return inputs | {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def two_images(generator, config):
    return with_images(generator, config, [[3, (16, 24), 4, (24, 8), 5]])


def images_across_rows(generator, config):
    return with_images(generator, config, [[2, (8, 24), 6], [(16, 16), 3, (24, 16), 2]], fill=3.0)


def images_left_padding(generator, config):
    """The rows of `images_across_rows`, with the padding moved to the front."""
    inputs = images_across_rows(generator, config)
    for row, real in enumerate(inputs["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "labels", "attention_mask"):
            inputs[name][row] = inputs[name][row].roll(inputs[name].shape[1] - real)
    first_real = inputs["attention_mask"].argmax(1)
    inputs["labels"][torch.arange(len(first_real)), first_real] = -100
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def make_inputs(name: str, config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of the prompt called `name`, for a `config.json`."""
    generator = torch.Generator().manual_seed(seed)
    flat = config.get("text_config", config) | {
        "spatial_merge_size": config.get("spatial_merge_size"),
        "patch_size": config.get("vision_config", {}).get("patch_size"),
    }
    inputs = globals()[name](generator, flat)
    return {key: value.contiguous() for key, value in inputs.items()}
