"""How close encoded tensors come to the entropy of what they hold, and how fast one core writes and reads them.

`python -m bench.encodings`: ternary tensors and tensors of levels at random positions. Speeds are in MB of the dense
bfloat16 tensor per second of processor time, so other load on the machine hardly moves them; medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import numpy.typing as npt

from bench.report import Row, bar, show, write
from store.encodings import Encoded, as_indices, decode, decode_levels, encode_levels, encode_smallest

DENSITIES = (0.002, 0.005, 0.01, 0.03, 0.05, 0.1, 0.2, 0.38, 1.0)
NUMEL = 1536 * 576 * 4
REPEATS = 5
TOP = 7


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits of a sequence of symbols that occur so often."""
    some = counts[counts > 0].astype(np.float64)
    return float(np.sum(some * np.log2(some.sum() / some)))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return median(found)


def measure(density: float, numel: int, repeats: int, *, levels: bool) -> Row:
    """One tensor written and read."""
    rng = np.random.default_rng(0)
    found = np.flatnonzero(rng.random(numel) < density)
    indices, nnz = as_indices(found, numel), len(found)
    values = np.where(rng.random(nnz) < 0.5, 1, -1).astype(np.int8)
    if levels:
        values *= np.minimum(rng.geometric(0.4, nnz), TOP).astype(np.int8)
    encode, read = (encode_levels, decode_levels) if levels else (encode_smallest, decode)
    encoded: Encoded = encode(indices, values, numel)
    bound = entropy(np.array([nnz, numel - nnz])) + entropy(np.unique(values, return_counts=True)[1])
    megabytes = 2 * numel / 1e6
    return {
        "values": f"levels to {TOP}" if levels else "ternary",
        "density": density,
        "encoding": encoded.name,
        "bits/param": 8 * len(encoded.payload) / numel,
        "over entropy": 8 * len(encoded.payload) / bound - 1,
        "encode MB/s": megabytes / seconds(lambda: encode(indices, values, numel), repeats),
        "decode MB/s": megabytes / seconds(lambda: read(encoded, nnz=nnz, numel=numel, tensor="t"), repeats),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.encodings", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small tensor once, nothing written")
    args = parser.parse_args()
    numel, repeats = (100_000, 1) if args.quick else (NUMEL, REPEATS)
    rows = [measure(density, numel, repeats, levels=levels) for levels in (False, True) for density in DENSITIES]
    sparse = [row for row in rows if float(str(row["density"])) <= 0.1]  # what experts are
    bars = [
        bar(
            "encodings.entropy",
            "most over the entropy",
            max(float(str(row["over entropy"])) for row in rows),
            "<=",
            0.03,
        ),
        bar("encodings.encode", "encoding up to density 0.1, slowest, MB/s", _least(sparse, "encode MB/s"), ">=", 100),
        bar("encodings.decode", "decoding up to density 0.1, slowest, MB/s", _least(sparse, "decode MB/s"), ">=", 500),
    ]
    show(rows, bars)
    if not args.quick:
        write("encodings", "python -m bench.encodings", rows, bars)


def _least(rows: list[Row], column: str) -> float:
    return min(float(str(row[column])) for row in rows)


if __name__ == "__main__":
    main()
