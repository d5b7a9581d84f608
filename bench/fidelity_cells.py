"""What `bench.fidelity` measures: a cell per task, method and size, in the order in which they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from store.codecs.base import Loss
from store.codecs.flex_recipe import FlexRecipe

WITHOUT_EMBEDDINGS: Mapping[str, float] = {"*embed_tokens*": 0.0}
"""A fifth of the parameters, and a small share of these task vectors' energy: codecs that are told how much of each
matrix to keep, and do not find out, spend their bytes elsewhere."""
SIZES = (0.02, 0.04, 0.1, 0.4)
"""Bits per parameter at which the methods are compared."""


@dataclass(frozen=True)
class Method:
    """A way to make an expert of a fine-tune.

    Attributes:
        name: as the table shows it.
        options: of `store.convert.compress`; empty where nothing is compressed.
        lora_rank: of the adapter that is trained instead of compressing anything.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    lora_rank: int = 0


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        size: the bits per parameter that it should take, about; 0 for the two ends of the scale.
    """

    task: str
    method: Method
    size: float

    @property
    def key(self) -> str:
        """The name of its files."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.method.name.lower()).strip("-")
        return f"{self.task}-{plain}-{self.size:g}"


BASE, TUNED = Method("base"), Method("fine-tune")
Column = tuple[Method, float]


def flex_switch(loss: str, size: float) -> Column:
    """Learned within exactly that size."""
    return Method(
        f"FlexSwitch ({loss})", {"codec": "flex-switch", "bits_per_param": size, "loss": Loss(loss.lower())}
    ), size


def flex_switch_as_published(size: float) -> Column:
    """The paper's recipe, with λ steered to that size, and no sign flipped."""
    return Method(
        "FlexSwitch (paper)", {"codec": "flex-switch", "bits_per_param": size, "recipe": FlexRecipe.PAPER}
    ), size


def t_switch(knob: str, density: float, size: float) -> Column:
    """The paper's method: magnitude decides."""
    options = {"codec": "t-switch", "knob": knob, "density": density, "tensor_density": WITHOUT_EMBEDDINGS}
    return Method(f"T-Switch ({knob})", options), size


def compeft(density: float, size: float) -> Column:
    """Magnitude over all matrices decides, and one scale."""
    options = {"codec": "compeft", "density": density, "tensor_density": WITHOUT_EMBEDDINGS}
    return Method("ComPEFT", options), size


def low_rank(rank: int, size: float) -> Column:
    """The task vector's largest singular directions."""
    options = {"codec": "low-rank", "rank": rank, "tensor_density": WITHOUT_EMBEDDINGS}
    return Method("low-rank (SVD)", options), size


def lora(rank: int, size: float) -> Column:
    """No task vector at all: an adapter of that size trained on the task."""
    return Method("LoRA, trained", lora_rank=rank), size


COLUMNS: Sequence[Sequence[Column]] = (
    ((TUNED, 0.0), (BASE, 0.0), flex_switch("KL", 0.04)),
    (flex_switch("KL", 0.02),),
    (t_switch("calibrated", 0.08, 0.4),),
    (t_switch("rms", 0.08, 0.4), low_rank(1, 0.04), low_rank(10, 0.4), (Method("raw", {"codec": "raw"}), 16.0)),
    ((Method("BitDelta", {"codec": "bit-delta", "tensor_density": WITHOUT_EMBEDDINGS}), 1.0), compeft(0.08, 0.4)),
    (t_switch("calibrated", 0.005, 0.04), compeft(0.005, 0.04), lora(1, 0.04)),
    (flex_switch("MSE", 0.04), flex_switch("CKA", 0.04), flex_switch_as_published(0.04), flex_switch("KL", 0.1)),
    (t_switch("calibrated", 0.0025, 0.02), t_switch("calibrated", 0.015, 0.1), compeft(0.015, 0.1), low_rank(3, 0.1)),
    (lora(3, 0.1), flex_switch("KL", 0.4), lora(10, 0.4)),
)
"""Rounds: every task has the columns of one before any task has those of the next. The bars come first."""


def cells(tasks: Sequence[str]) -> list[Cell]:
    """All cells in the order in which they are measured."""
    return [Cell(task, method, size) for columns in COLUMNS for task in tasks for method, size in columns]
