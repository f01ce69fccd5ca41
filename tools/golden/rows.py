"""Writes tests/golden/data: training rows as Parquet files, as pyarrow and the datasets library write them, each with a
twin in JSONL that holds the same rows.

Needs pyarrow and Pillow (see requirements.txt). Deterministic; `python tools/golden/rows.py` writes the same rows each
time.
"""

import base64
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

OUT = Path(__file__).resolve().parents[2] / "tests" / "golden" / "data"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

CHAT = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief. Ne soyez pas bavard: \u00e9t\u00e9, \u6771\u4eac."},
            {"role": "user", "content": "Weather in Rome?"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "abcdefghi",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                    }
                ],
            },
            {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": json.dumps([WEATHER]),
    },
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "reasoning_content": "two and two", "content": "4"},
            {"role": "user", "content": "and 3 + 3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
]

CALL = pa.struct(
    {
        "id": pa.string(),
        "type": pa.string(),
        "function": pa.struct({"name": pa.string(), "arguments": pa.string()}),
    }
)
MESSAGE = pa.struct(
    {
        "role": pa.string(),
        "content": pa.string(),
        "reasoning_content": pa.string(),
        "tool_calls": pa.list_(CALL),
        "tool_call_id": pa.string(),
    }
)
PART = pa.struct({"type": pa.string(), "text": pa.string()})
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def picture(width: int, height: int) -> bytes:
    pixels = bytes((7 * x + 13 * y + 50 * c) % 256 for y in range(height) for x in range(width) for c in range(3))
    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


def write(name: str, schema: pa.Schema, rows: list, twin: list, **options) -> None:
    # The datasets library notes its features in the schema's metadata.
    features = json.dumps({"info": {"features": {field: {"_type": "Value"} for field in schema.names}}})
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"huggingface": features}))
    pq.write_table(table, OUT / f"{name}.parquet", **options)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in twin)
    (OUT / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def chat() -> None:
    schema = pa.schema({"messages": pa.list_(MESSAGE), "tools": pa.string()})
    write("chat", schema, CHAT, CHAT, row_group_size=2, compression="snappy")
    texts = [row | {"messages": json.dumps(row["messages"])} for row in CHAT]
    schema = pa.schema({"messages": pa.large_string(), "tools": pa.string(), "source": pa.dictionary(pa.int32(), pa.string())})
    write("chat_strings", schema, [row | {"source": "web"} for row in texts], CHAT, compression="zstd", data_page_version="2.0")
    turns = [
        {"conversations": [{"from": "human", "value": f"question {i}"}, {"from": "gpt", "value": f"answer {i}"}]}
        for i in range(40)
    ]
    schema = pa.schema({"conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))})
    write("share_gpt", schema, turns, turns, row_group_size=16, compression="gzip")


def vlm() -> None:
    sizes = [(16, 8), (8, 8), (24, 16)]
    pictures = [picture(*size) for size in sizes]
    encoded = [base64.b64encode(data).decode() for data in pictures]
    ask = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    tell = [{"type": "text", "text": "noise"}]
    messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": tell}]
    rows = [{"messages": messages, "image": {"bytes": data, "path": f"{i}.png"}} for i, data in enumerate(pictures)]
    twin = [{"messages": messages, "image": data} for data in encoded]
    parts = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(PART)}))
    write("vlm_image", pa.schema({"messages": parts, "image": PICTURE}), rows, twin, compression="none")
    both = [{"role": "user", "content": "<image>\n<image>\nCompare."}, {"role": "assistant", "content": "both noise"}]
    plain = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    rows = [{"messages": both, "images": [{"bytes": pictures[0]}, {"bytes": pictures[2], "path": "c.png"}]}]
    twin = [{"messages": both, "images": [encoded[0], encoded[2]]}]
    write("vlm_images", pa.schema({"messages": plain, "images": pa.list_(PICTURE)}), rows, twin)
    about = [{"mode": "CT", "case_id": f"MPX{i}", "question": f"What is {i}?", "answer": f"noise {i}"} for i in range(3)]
    rows = [row | {"image_id": {"bytes": data}} for row, data in zip(about, pictures, strict=True)]
    twin = [row | {"image_id": data} for row, data in zip(about, encoded, strict=True)]
    strings = {name: pa.string() for name in ("mode", "case_id", "question", "answer")}
    write("medpix", pa.schema({"image_id": PICTURE} | strings), rows, twin)


def others() -> None:
    texts = [{"text": f"Document {i}. " + "word " * (i % 7), "id": i} for i in range(60)]
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    write("text", schema, texts, texts, row_group_size=25, compression="lz4")
    rows = [{"definition": "Add.", "inputs": f"{i} + 1", "targets": str(i + 1), "score": i / 2} for i in range(5)]
    schema = pa.schema({"definition": pa.string(), "inputs": pa.string(), "targets": pa.string(), "score": pa.float64()})
    write("instruction", schema, rows, rows)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    chat()
    vlm()
    others()
