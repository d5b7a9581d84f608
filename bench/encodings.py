"""How close encoded tensors come to the entropy of what they hold, and how fast one core writes and reads them.

`python -m bench.encodings`: ternary tensors, levels, and steps of overwritten weights, at random positions. Beside
NumPy reads the native decoder, into what the engine keeps. Speeds are in MB of the dense bfloat16 tensor per second of
processor time, so other load on the machine hardly moves them; medians. The entropy is swept more finely than the
speeds, and beside it stands what raw tensors and low-rank factors leave lying: they are plain bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt

from bench.report import Bar, Row, bar, show, write
from examples.fetch import CACHE
from server.engine.kernels import build
from server.engine.kernels.build import BuildError
from server.engine.kernels.decoding import Decoder
from store.bfloat16 import to_bfloat16
from store.encodings import Encoded, as_indices, encode_levels, encode_smallest, encode_steps
from store.packed import PackedDense, PackedLevels, PackedOverwrite, PackedTernary
from store.patterns import Half

DENSITIES = (0.002, 0.005, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.38, 0.6, 1.0)
SWEPT = (*np.geomspace(0.001, 0.1, 41), *np.linspace(0.1, 1.0, 91), *np.linspace(0.37, 0.39, 11))
"""The last are where Rice code and bitmap meet, which is where both are worst."""
SWEPT_COARSELY = (0.01, 0.05, 0.2, 0.37, 0.376, 0.382, 0.388, 0.5, 0.618, 0.8, 1.0)
MOST_OF_EXPERTS = 0.3
"""Reinforcement learning changes 5 to 30 % of the weights (arXiv 2505.11711); other experts are sparser."""
COLUMNS = 576
ROWS = 1536 * 4
SMALL, SMALL_DENSITIES = 192, (0.01, 0.05, 0.2)
"""The smallest matrices of SmolLM2, of which a call of NumPy takes longer than the work."""
REPEATS = 5

Numbers = npt.NDArray[np.int8] | npt.NDArray[np.int16]
Sparse = PackedTernary | PackedOverwrite


@dataclass(frozen=True)
class Values:
    """What the nonzeros of a tensor are: signs, steps of overwritten weights, or levels.

    Attributes:
        top: the largest level.
        peak: the share of the levels that are 1, and of the others those that are 2, and so on.
    """

    name: str
    top: int = 1
    peak: float = 1.0

    def draw(self, rng: np.random.Generator, count: int) -> Numbers:
        signs = np.where(rng.random(count) < 0.5, 1, -1)
        if self is OVERWRITE:
            return (np.ceil(np.exp(rng.normal(1, 1.5, count))).clip(1, 2**15 - 1) * signs).astype(np.int16)
        return (np.minimum(rng.geometric(self.peak, count), self.top) * signs).astype(np.int8)

    def encode(self, indices: npt.NDArray[np.int32], values: Numbers, numel: int) -> Encoded:
        if self is OVERWRITE:
            return encode_steps(indices, values.astype(np.int16, copy=False), numel)
        levels = values.astype(np.int8, copy=False)
        return (encode_smallest if self is TERNARY else encode_levels)(indices, levels, numel)

    def pack(self, encoded: Encoded, nnz: int, rows: int) -> Sparse:
        shape = (rows, COLUMNS)
        if self is OVERWRITE:
            return PackedOverwrite(shape, nnz, encoded, Half.BF16, "")
        return (PackedTernary if self is TERNARY else PackedLevels)(shape, nnz, 0.5, encoded)


TERNARY, OVERWRITE = Values("ternary"), Values("overwrite")
KINDS = (TERNARY, Values("levels to 7", 7, 0.4), Values("levels to 127", 127, 0.05), OVERWRITE)
LEVELS = tuple(
    Values(f"levels to {top}, {peak:.2f} of them 1", top, peak)
    for top in (2, 3, 7, 127)
    for peak in (0.9, 0.62, 0.4, 0.2, 0.05)
)


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits of a sequence of symbols that occur so often."""
    some = counts[counts > 0].astype(np.float64)
    return float(np.sum(some * np.log2(some.sum() / some)))


def over(payload: int, values: Numbers, numel: int) -> float:
    """How much longer so many bytes are than the entropy of random positions and the values there."""
    occurring = np.bincount(values.astype(np.int64) + 2**15)
    bound = entropy(np.array([len(values), numel - len(values)])) + entropy(occurring)
    return 8 * payload / bound - 1


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time of a call."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return median(found)


def sample(kind: Values, density: float, rows: int) -> tuple[npt.NDArray[np.int32], Numbers]:
    """Random positions and their values."""
    rng, numel = np.random.default_rng(0), rows * COLUMNS
    indices = as_indices(np.flatnonzero(rng.random(numel) < density), numel).astype(np.int32, copy=False)
    return indices, kind.draw(rng, len(indices))


def measure(kind: Values, density: float, rows: int, repeats: int, decoder: Decoder | None) -> Row:
    """One tensor written and read."""
    numel = rows * COLUMNS
    indices, values = sample(kind, density, rows)
    encoded = kind.encode(indices, values, numel)
    tensor = kind.pack(encoded, len(indices), rows)
    native = None if decoder is None else partial(read_natively, decoder, tensor)
    return {
        "values": kind.name,
        "rows": rows,
        "density": density,
        "encoding": encoded.name,
        "bits/param": 8 * len(encoded.payload) / numel,
        "over entropy": over(len(encoded.payload), values, numel),
        **speeds(partial(kind.encode, indices, values, numel), partial(tensor.decode, "t"), native, numel, repeats),
    }


def read_natively(decoder: Decoder, tensor: Sparse) -> None:
    """What the engine does when it loads an expert; fails where only NumPy will do."""
    made = decoder.decode(tensor) if isinstance(tensor, PackedTernary) else decoder.decode_overwrite(tensor)
    assert made is not None


def measure_raw(rows: int, repeats: int) -> Row:
    """What raw tensors and factors are: Gaussian numbers in bfloat16."""
    values = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32) * np.float32(0.01)
    payload = to_bfloat16(values).tobytes()
    occurring = np.bincount(np.frombuffer(payload, np.uint16))
    tensor = PackedDense(values.shape, payload)
    return {
        "values": "bfloat16 (raw, factors)",
        "rows": rows,
        "density": 1.0,
        "encoding": "none",
        "bits/param": 16.0,
        "over entropy": 8 * len(payload) / entropy(occurring) - 1,
        **speeds(lambda: to_bfloat16(values).tobytes(), partial(tensor.decode, "t"), None, values.size, repeats),
    }


def speeds(
    encode: Callable[[], object],
    decode: Callable[[], object],
    native: Callable[[], object] | None,
    numel: int,
    repeats: int,
) -> dict[str, float | None]:
    """MB of dense bfloat16 per second of each."""
    works = {"encode MB/s": encode, "decode MB/s": decode, "native decode MB/s": native}
    return {name: None if work is None else 2 * numel / 1e6 / seconds(work, repeats) for name, work in works.items()}


def sweep(name: str, kinds: Sequence[Values], densities: Sequence[float], rows: int) -> Row:
    """Where tensors of some values are furthest from their entropy."""
    worst: Row = {"over entropy": 0.0}
    for kind in kinds:
        for density in densities:
            indices, values = sample(kind, density, rows)
            encoded = kind.encode(indices, values, rows * COLUMNS)
            excess = over(len(encoded.payload), values, rows * COLUMNS)
            if excess > _number(worst, "over entropy"):
                worst = {
                    "swept": name,
                    "worst at": kind.name,
                    "density": round(float(density), 4),
                    "over entropy": excess,
                }
    return worst


def native_decoder() -> Decoder | None:
    """Built from its own source alone; None where there is no compiler."""
    try:
        return Decoder(build.load(CACHE, sources=tuple(path for path in build.SOURCES if path.name == "decode.cpp")))
    except BuildError as error:
        print(f"no native decoder: {error}")
        return None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.encodings", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small tensors once, nothing written")
    args = parser.parse_args()
    rows, repeats = (256, 1) if args.quick else (ROWS, REPEATS)
    decoder = native_decoder()
    found = [measure(kind, density, rows, repeats, decoder) for kind in KINDS for density in DENSITIES]
    if not args.quick:
        found += [measure(kind, density, SMALL, repeats, decoder) for kind in KINDS for density in SMALL_DENSITIES]
    raw = measure_raw(rows, repeats)
    swept = [
        sweep("ternary", [TERNARY], SWEPT, rows),
        sweep("levels", LEVELS, SWEPT_COARSELY, rows),
        sweep("overwrite", [OVERWRITE], SWEPT_COARSELY, rows),
    ]
    bars = [*entropy_bars(swept, raw), *speed_bars(found)]
    show([*found, raw])
    show(swept, bars)
    if not args.quick:
        write("encodings", "python -m bench.encodings", [*found, raw, *swept], bars)


def entropy_bars(swept: Sequence[Row], raw: Row) -> list[Bar]:
    """Of each kind its own: the bound does not hold for all."""
    bars = []
    for row in swept:
        what = f"{row['swept']} tensors at random positions of any density: most over the entropy"
        bars.append(bar(f"encodings.entropy.{row['swept']}", what, _number(row, "over entropy"), "<=", 0.03))
    what = "raw tensors and low-rank factors, Gaussian: over the entropy of their bfloat16"
    return [*bars, bar("encodings.entropy.bfloat16", what, _number(raw, "over entropy"), "<=", 0.03)]


def speed_bars(found: Sequence[Row]) -> list[Bar]:
    """The slowest of what experts are, and of anything."""
    usual = [row for row in found if _number(row, "density") <= MOST_OF_EXPERTS]
    bars = []
    for name, what, goal in (
        ("encode", "encoding", 100),
        ("native decode", "decoding natively", 500),
        ("decode", "decoding in NumPy", 500),
    ):
        if found[0][f"{name} MB/s"] is None:
            continue
        for end, where, rows in (("", f"up to density {MOST_OF_EXPERTS}", usual), ("-any", "any density", found)):
            slowest = min(_number(row, f"{name} MB/s") for row in rows)
            id_ = f"encodings.{name.replace(' ', '-')}{end}"
            bars.append(bar(id_, f"{what}, {where}, slowest, MB/s", slowest, ">=", goal))
    return bars


def _number(row: Row, column: str) -> float:
    return float(str(row[column]))


if __name__ == "__main__":
    main()
