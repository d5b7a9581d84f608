"""`switchyard inspect --plot`: where an expert spends its bits, by layer and module, as a picture."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.errors import MissingPackageError, StoreError
from store.expert_file import SparseEntry, read_header, tensor_bytes

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_OUTSIDE = "outside"
"""The row of what belongs to no layer: embedding, last norm, head."""


def by_layer(file: Path) -> tuple[list[str], list[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Layers, modules, and of each pair density and bits per element, `[layers, modules]`; NaN where nothing is.

    Raises:
        ExpertFileError: the file breaks a rule of the format.
    """
    header, sizes = read_header(file), tensor_bytes(file)
    sums: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, entry in header.tensors.items():
        found = _LAYER.search(name)
        layer = found.group(1) if found else _OUTSIDE
        module = (name[found.end() :] if found else name).removesuffix(".weight")
        cell = sums[layer, module]
        cell[0] += entry.numel
        cell[1] += entry.nnz if isinstance(entry, SparseEntry) else entry.numel
        cell[2] += 8 * sizes[name]
    numbers = sorted({int(layer) for layer, _ in sums if layer != _OUTSIDE})
    layers = [*map(str, numbers), *([_OUTSIDE] if any(layer == _OUTSIDE for layer, _ in sums) else [])]
    modules = list(dict.fromkeys(module for layer in layers for (own, module) in sums if own == layer))
    density, bits = np.full((2, len(layers), len(modules)), np.nan)
    for (layer, module), (numel, nonzeros, spent) in sums.items():
        place = layers.index(layer), modules.index(module)
        density[place], bits[place] = nonzeros / max(1, numel), spent / max(1, numel)
    return layers, modules, density, bits


def plot_expert(file: Path, picture: Path) -> None:
    """Draw density and bits per element by layer and module.

    Raises:
        ExpertFileError: the file breaks a rule of the format.
        MissingPackageError: matplotlib is not installed.
        StoreError: the picture cannot be written.
    """
    layers, modules, *values = by_layer(file)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError(
            "--plot draws with matplotlib, which is not installed: pip install 'switchyard[plots]'"
        ) from None
    figure = Figure(figsize=(4 + 0.9 * len(modules), 2.5 + 0.25 * len(layers)), layout="constrained")
    for axes, title, cells in zip(
        figure.subplots(1, 2, sharey=True), ("density", "bits per element"), values, strict=True
    ):
        image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(title)
        axes.set_xticks(range(len(modules)), modules, rotation=90, fontsize=7)
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        figure.colorbar(image, ax=axes)
    figure.supylabel("layer")
    figure.suptitle(file.name, fontsize=9)
    try:
        figure.savefig(picture, format="png", dpi=120)
    except OSError as error:
        raise StoreError(f"cannot write {picture.name}: {error.strerror}") from None
