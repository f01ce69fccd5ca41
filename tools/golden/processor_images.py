"""Writes the golden fixtures of the image processor with transformers and mistral_common.

Pinned: transformers 5.24.0, mistral_common 1.13.1, pillow 13.0.0, opencv-python-headless 5.0.0. Deterministic.

    python tools/golden/processor_images.py                       # the committed fixtures
    python tools/golden/processor_images.py --out DIR --seed N    # 150 pictures of random sizes, not committed

Files in tests/golden/processor: `images/*` the pictures, `images.json` the cases, `images.safetensors` the pixel values
(`<case>`, f32 [3, H, W]).

transformers picks its Pillow processor when torchvision is not installed, as here; with torchvision it resizes 8-bit
tensors instead, which differs by one step in single pixels. The Pillow processor raises where a side would vanish; the
expected values are then Pillow's own for the size that keeps one image token.
"""

import argparse
import json
from pathlib import Path

import cv2
import mistral_common
import numpy as np
import PIL
import transformers
from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs, transform_image
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

FORMAT_VERSION = 1
OUT = Path(__file__).parents[2] / "tests" / "golden" / "processor"


def pattern(height, width, channels, seed):
    """Waves with noise, so that resizing meets edges, gradients and overshoot."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for channel in range(channels):
        wave = 127 + 100 * np.sin(x / (3 + channel) + seed) * np.cos(y / (4 + channel)) + 60 * ((x // 7 + y // 5 + channel) % 2)
        planes.append(np.clip(wave + generator.integers(-40, 41, (height, width)), 0, 255))
    array = np.stack(planes, -1).astype(np.uint8)
    return array[..., 0] if channels == 1 else array


def pictures():
    """(file name, writer) for every picture."""
    rgb = Image.fromarray(pattern(37, 53, 3, 1))
    rgba = Image.fromarray(pattern(30, 44, 4, 2))
    grey = Image.fromarray(pattern(41, 23, 1, 3))
    yield "rgb.png", lambda p: rgb.save(p)
    yield "rgba.png", lambda p: rgba.save(p)
    yield "grey.png", lambda p: grey.save(p)
    yield "grey_alpha.png", lambda p: rgba.convert("LA").save(p)
    yield "bilevel.png", lambda p: grey.convert("1").save(p)
    yield "palette.png", lambda p: rgb.quantize(31).save(p)
    yield "palette_transparent.png", lambda p: rgb.quantize(17).save(p, transparency=3)
    yield "rgb_transparent.png", lambda p: Image.fromarray(pattern(20, 20, 3, 5) // 64 * 64).save(p, transparency=(128, 128, 128))
    yield "grey16.png", lambda p: Image.fromarray((pattern(25, 31, 1, 6).astype(np.uint16) * 257) ^ np.uint16(0x35)).save(p)
    yield "rgb16.png", lambda p: cv2.imwrite(str(p), pattern(19, 27, 3, 14).astype(np.uint16) * 257 ^ 0x5A)
    yield "tall.png", lambda p: Image.fromarray(pattern(97, 3, 3, 7)).save(p)
    yield "wide.png", lambda p: Image.fromarray(pattern(2, 120, 3, 8)).save(p)
    yield "dot.png", lambda p: Image.fromarray(pattern(1, 1, 3, 9)).save(p)
    yield "exact.png", lambda p: Image.fromarray(pattern(16, 24, 3, 10)).save(p)
    yield "thin.png", lambda p: Image.fromarray(pattern(300, 1, 3, 11)).save(p)
    yield "large.png", lambda p: Image.fromarray(pattern(131, 170, 3, 12) // 32 * 32).save(p)
    yield "rgb.bmp", lambda p: rgb.save(p)
    yield "palette.gif", lambda p: rgb.quantize(40).save(p)
    yield "transparent.gif", lambda p: rgb.quantize(20).save(p, transparency=2)
    yield "lossless.webp", lambda p: rgb.save(p, lossless=True)
    yield "lossless_alpha.webp", lambda p: rgba.save(p, lossless=True, exact=True)
    yield "lossy.webp", lambda p: rgb.save(p, quality=80)
    smooth = Image.fromarray(pattern(80, 64, 3, 13)).resize((96, 120), Image.Resampling.BICUBIC)
    yield "444.jpg", lambda p: smooth.save(p, quality=92, subsampling=0)
    yield "420.jpg", lambda p: smooth.save(p, quality=85, subsampling=2)
    yield "progressive.jpg", lambda p: smooth.save(p, quality=90, progressive=True, subsampling=1)
    yield "grey.jpg", lambda p: grey.resize((60, 50)).save(p, quality=90)
    yield "cmyk.jpg", lambda p: smooth.convert("CMYK").save(p, quality=95)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif_{orientation}.png", lambda p, exif=exif: rgb.save(p, exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "exif_6.jpg", lambda p, exif=exif: smooth.save(p, quality=92, subsampling=0, exif=exif)


def kept(image, longest, token):
    """The size that transformers computes, a side kept at one image token."""
    ratio = max(image.height / longest, image.width / longest)
    sides = [image.height, image.width]
    if ratio > 1:
        sides = [max(int(np.floor(side / ratio)), 1) for side in (image.height, image.width)]
    return [((side - 1) // token + 1) * token for side in sides]


def hugging_face(image, longest, token, resample=3, **options):
    processor = PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size={"height": token, "width": token}, resample=resample, **options)
    try:
        batch = processor(images=[image], return_tensors="np")
    except ValueError:
        height, width = kept(image, longest, token)
        array = np.moveaxis(processor.convert_to_rgb(image), -1, 0)
        resized = np.array(Image.fromarray(np.moveaxis(array, 0, -1)).resize((width, height), resample))
        values = processor.normalize(processor.rescale(np.moveaxis(resized, -1, 0), 1 / 255), processor.image_mean, processor.image_std)
        return values.astype(np.float32), True
    return batch["pixel_values"][0].astype(np.float32), False


def random_pictures(seed):
    """Pictures of random sizes and modes, all lossless."""
    generator = np.random.default_rng(seed)
    for index in range(150):
        height, width = (int(generator.integers(1, limit)) for limit in generator.choice([9, 70, 300], 2))
        channels = int(generator.choice([1, 3, 3, 4]))
        image = Image.fromarray(pattern(height, width, channels, index))
        yield f"{index}.png", lambda p, image=image: image.save(p)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int)
    arguments = parser.parse_args()
    out, chosen = arguments.out, pictures() if arguments.seed is None else random_pictures(arguments.seed)
    folder = out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    cases, tensors = [], {}

    def add(file, kind, longest, patch, merge, values, **more):
        name = f"{file}-{kind}-{longest}-{patch}-{merge}" + "".join(f"-{key}{value}" for key, value in more.items())
        tensors[name] = np.ascontiguousarray(values)
        cases.append({"name": name, "file": file, "kind": kind, "longest": longest, "patch": patch, "merge": merge, **more})

    for file, write in chosen:
        write(folder / file)
        image = ImageOps.exif_transpose(Image.open(folder / file))
        if image.mode == "I;16":
            # Pillow would clip at 255, which makes such pictures white; we keep the high byte, as it does for 16-bit RGB.
            image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
        if image.mode == "RGB" and "transparency" in image.info:
            # mistral_common would drop this kind of transparency; we lay it on white.
            image = image.convert("RGBA")
        values, vanished = hugging_face(image, 32, 8)
        add(file, "hf", 32, 4, 2, values)
        if vanished:
            print(file, "vanishes in transformers")
        encoder = ImageEncoder(ImageConfig(4, 32, 2), SpecialImageIDs(10, 12, 13))
        columns, rows = encoder._image_to_num_tokens(image)
        add(file, "mistral_common", 32, 4, 2, transform_image(image, (columns * 8, rows * 8)))
    if arguments.seed is None:
        for file in ["rgb.png", "large.png", "exact.png"]:
            image = Image.open(folder / file)
            add(file, "hf", 1540, 14, 2, hugging_face(image, 1540, 28)[0])
        image = Image.open(folder / "large.png")
        for resample in [1, 2]:
            add("large.png", "hf", 64, 8, 1, hugging_face(image, 64, 8, resample)[0], resample=resample)

    save_file(tensors, out / "images.safetensors")
    versions = {"transformers": transformers.__version__, "mistral_common": mistral_common.__version__, "pillow": PIL.__version__}
    text = json.dumps({"format_version": FORMAT_VERSION, **versions, "cases": cases}, indent=0)
    (out / "images.json").write_text(text + "\n", encoding="utf-8")
    print(len(cases), "cases,", (out / "images.safetensors").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
