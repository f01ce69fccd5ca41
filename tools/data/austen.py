"""Writes data/austen/pride_and_prejudice_1_23.txt from Debian's package r-cran-janeaustenr (1.0.0-1).

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb janeaustenr
    python tools/data/austen.py janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

An R database file is a run of objects: a big-endian length, a letter for the compression, the compressed bytes, which
hold R's XDR serialisation. The novel is a vector of lines; lines of a paragraph are joined, and paragraphs are kept
apart by an empty line.
"""

import bz2
import lzma
import pathlib
import re
import struct
import sys
import zlib


def objects(data):
    """Every decompressed object of the file, found by trying each offset that can begin one."""
    at = 0
    while at < len(data) - 5:
        length = struct.unpack(">I", data[at : at + 4])[0]
        body = data[at + 5 :]
        opened = {
            b"2": bz2.BZ2Decompressor,
            b"Z": lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]),
        }.get(data[at + 4 : at + 5])
        if opened is None:
            opened, body = zlib.decompressobj, data[at + 4 :]
        try:
            reader = opened()
            out = reader.decompress(body)
        except (zlib.error, lzma.LZMAError, OSError):
            at += 1
            continue
        if len(out) != length:
            at += 1
            continue
        yield out
        at = len(data) - len(reader.unused_data) if reader.unused_data else len(data)


def strings(serialised):
    """A character vector's strings; an empty list for any other object."""
    at = serialised.find(b"\x00\x00\x00\x10")
    if not serialised.startswith(b"X\n") or at < 0 or at > 40:
        return []
    count = struct.unpack(">I", serialised[at + 4 : at + 8])[0]
    at, found = at + 8, []
    for _ in range(count):
        length = struct.unpack(">i", serialised[at + 4 : at + 8])[0]
        found.append(serialised[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return found


novels = [strings(obj) for obj in objects(pathlib.Path(sys.argv[1]).read_bytes())]
novel = next(lines for lines in novels if any(line.strip() == "PRIDE AND PREJUDICE" for line in lines[:5]))
text = "\n".join(line.rstrip() for line in novel)
chapters = re.split(r"^(?=Chapter \d+$)", text, flags=re.M)[1:24]
assert [chapter.split("\n")[0] for chapter in chapters] == [f"Chapter {n}" for n in range(1, 24)]
paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", "".join(chapters)) if part.strip()]
out = pathlib.Path(__file__).resolve().parents[2] / "data" / "austen" / "pride_and_prejudice_1_23.txt"
out.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
print(len(out.read_bytes()), "bytes")
