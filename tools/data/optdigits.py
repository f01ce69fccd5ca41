"""Writes data/optdigits/images.png and data/optdigits/labels.txt from scikit-learn's copy of the UCI optdigits set.

    python tools/data/optdigits.py          (scikit-learn 1.9.1, Pillow 12; any version with `load_digits` will do)

The sheet holds 1797 tiles of 8x8 pixels, 47 columns by 39 rows (the last 36 tiles are empty), in the set's order, left
to right and top to bottom. A pixel is the set's number 0..16, stored as a grey value 15 times as large.
"""

import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

COLUMNS, ROWS, SIDE, SCALE = 47, 39, 8, 15

digits = load_digits()
assert digits.images.shape == (1797, SIDE, SIDE) and digits.images.max() == 16

sheet = np.zeros((ROWS * SIDE, COLUMNS * SIDE), dtype=np.uint8)
for index, image in enumerate(digits.images):
    row, column = divmod(index, COLUMNS)
    sheet[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = image.astype(np.uint8) * SCALE

out = pathlib.Path(__file__).resolve().parents[2] / "data" / "optdigits"
out.mkdir(parents=True, exist_ok=True)
Image.fromarray(sheet).save(out / "images.png", optimize=True)
lines = ["".join(str(label) for label in digits.target[start : start + COLUMNS]) for start in range(0, 1797, COLUMNS)]
(out / "labels.txt").write_text("\n".join(lines) + "\n")
