"""`switchyard inspect --plot`: where an expert spends its bits, by layer and module, as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.errors import MissingPackageError, StoreError
from store.layers import spent_by_module


def by_layer(file: Path) -> tuple[list[str], list[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Layers, modules, and of each pair density and bits per element, `[layers, modules]`; NaN where nothing is.

    Raises:
        ExpertFileError: the file breaks a rule of the format.
    """
    found = spent_by_module(file)
    layers = list(dict.fromkeys(layer for layer, _ in found))
    modules = list(dict.fromkeys(module for _, module in found))
    density, bits = np.full((2, len(layers), len(modules)), np.nan)
    for (layer, module), spent in found.items():
        place = layers.index(layer), modules.index(module)
        density[place], bits[place] = spent.density, spent.bits_per_param
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
