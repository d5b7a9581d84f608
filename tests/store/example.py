"""The worked example of docs/expert-file.md: `python -m tests.store.example` brings the document up to date."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from store.bfloat16 import to_bfloat16
from store.encodings import BITMAP, Encoded, encode_smallest
from store.expert_file import ExpertInfo, write_expert
from store.fingerprint import manifest_of
from store.packed import PackedDense, PackedTernary
from tests.store.builders import join_file

DOCUMENT = Path(__file__).parents[2] / "docs" / "expert-file.md"
MARKED = re.compile(r"(?<=<!-- example: begin -->\n).*(?=<!-- example: end -->)", re.DOTALL)

SHAPE = (8, 16)
INDICES = [5, 40, 41, 90]
LEVELS = [1, -1, 1, 1]
SMALL = ([1, 2, 4, 7, 9], [1, -1, -1, 1, 1], 10)
NORM = np.array([1.0, -0.5], dtype=np.float32)


def example() -> str:
    """The part of the document between its marks, in Markdown."""
    return "".join(_lines())


def _lines() -> Iterator[str]:
    rice = encode_smallest(np.array(INDICES, np.int32), np.array(LEVELS, np.int8), SHAPE[0] * SHAPE[1])
    small = encode_smallest(np.array(SMALL[0], np.int32), np.array(SMALL[1], np.int8), SMALL[2])
    assert small.name == BITMAP
    yield f"**Bitmap.** {SMALL[2]} elements, nonzero at {SMALL[0]} with signs {_signs(SMALL[1])}:\n\n"
    yield f"```text\n{small.payload.hex(' ')}\n```\n\n"
    yield from _explain_rice(rice)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {"norm": ("F32", NORM), "w": ("F32", np.zeros(SHAPE, np.float32))}
        table, offset = {}, 0
        for tensor, (dtype, values) in weights.items():
            stop = offset + values.nbytes
            table[tensor] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, stop]}
            offset = stop
        data = b"".join(values.tobytes() for _, values in weights.values())
        (folder / "model.safetensors").write_bytes(join_file(table, data))
        base = manifest_of(folder, None)
        tensors = {
            "norm": PackedDense((2,), to_bfloat16(np.array([0.25, 3.0], np.float32)).tobytes()),
            "w": PackedTernary(SHAPE, len(INDICES), 0.0625, rice),
        }
        info = ExpertInfo(codec="t-switch", codec_params={"density": 0.03, "knob": "l1"}, tool="example", name="tiny")
        write_expert(folder / "expert", info, tensors, base)
        content = (folder / "expert").read_bytes()
    yield "**A base and its fingerprint.** Two float32 tensors, `norm` = [1.0, -0.5] and `w` = zeros of shape "
    yield "[8, 16]:\n\n"
    yield f"```text\n{base.fingerprint}\n```\n\n"
    yield "**A whole file** for that base: `norm` raw as [0.25, 3.0], `w` the Rice tensor above with scale 0.0625. "
    yield f"{len(content)} bytes, sha256 `{hashlib.sha256(content).hexdigest()}`:\n\n```text\n"
    for start in range(0, len(content), 16):
        row = content[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{start:04x}  {row.hex(' '):<47}  {text}\n"
    yield "```\n"


def _explain_rice(rice: Encoded) -> Iterator[str]:
    k = rice.params["k"]
    gaps = np.diff(INDICES, prepend=-1) - 1
    quotients, remainders = gaps >> k, gaps & ((1 << k) - 1)
    unary = " ".join("0" * quotient + "1" for quotient in quotients)
    binary = " ".join(f"{remainder:0{k}b}"[::-1] for remainder in remainders)
    signs = " ".join("1" if level > 0 else "0" for level in LEVELS)
    yield f"**Rice.** Shape {list(SHAPE)}, nonzero at {INDICES} with signs {_signs(LEVELS)}; k = {k}. Gaps "
    yield f"{gaps.tolist()}, quotients {quotients.tolist()}, remainders {remainders.tolist()}. "
    yield f"Bits in stream order:\n\n```text\nunary       {unary}\nremainders  {binary}\nsigns       {signs}\n"
    yield f"payload     {rice.payload.hex(' ')}\n```\n\n"


def _signs(levels: list[int]) -> str:
    return " ".join("+" if level > 0 else "-" for level in levels)


if __name__ == "__main__":
    DOCUMENT.write_text(MARKED.sub(lambda _: example(), DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
