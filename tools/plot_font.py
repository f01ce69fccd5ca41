"""Writes the glyphs that `mistral4 plot` draws PNG pictures with: crates/mistral4-train/src/assets/glyphs*.

    python tools/plot_font.py FOLDER_WITH_DEJAVU_SANS

Needs Pillow. The font is DejaVu Sans (free to use and to embed; Bitstream Vera licence).
"""

import pathlib
import sys

from PIL import Image, ImageDraw, ImageFont

EM, CELL, BASELINE, COLUMNS, MARGIN = 48, (56, 64), 48, 16, 4
OUT = pathlib.Path(__file__).parents[1] / "crates" / "mistral4-train" / "src" / "assets"

advances = []
for name, file in [("glyphs.png", "DejaVuSans.ttf"), ("glyphs_bold.png", "DejaVuSans-Bold.ttf")]:
    font = ImageFont.truetype(str(pathlib.Path(sys.argv[1]) / file), EM)
    sheet = Image.new("L", (COLUMNS * CELL[0], -(-95 // COLUMNS) * CELL[1]))
    draw = ImageDraw.Draw(sheet)
    for index in range(95):
        left, top = index % COLUMNS * CELL[0], index // COLUMNS * CELL[1]
        glyph = Image.new("L", CELL)
        ImageDraw.Draw(glyph).text((MARGIN, BASELINE), chr(32 + index), font=font, fill=255, anchor="ls")
        sheet.paste(glyph, (left, top))
    sheet.save(OUT / name, optimize=True)
    advances.append([round(font.getlength(chr(32 + index)) * 64) for index in range(95)])
lines = ",\n".join("    [" + ", ".join(map(str, row)) + "]" for row in advances)
(OUT / "glyph_advances.in").write_text(f"[\n{lines},\n]\n")
