"""Which codec packs which tensor, and the settings each understands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from store.codecs.base import Codec, CodecName, Loss
from store.codecs.bit_delta import BitDelta
from store.codecs.compeft import ComPEFT
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.codecs.low_rank import LowRank
from store.codecs.raw import Raw, is_raw
from store.codecs.t_switch import Knob, TSwitch
from store.compress_rules import check_tensor_density
from store.errors import InvalidRequestError

if TYPE_CHECKING:
    import torch


CALIBRATED = frozenset({CodecName.T_SWITCH, CodecName.COMPEFT, CodecName.BIT_DELTA})
"""Codecs whose scales are fitted to exemplars afterwards."""


@dataclass(frozen=True)
class Recipe:
    """A codec and its settings.

    Attributes:
        codec: the method.
        density: fraction kept, of `t-switch` and `compeft`.
        knob: how scales are chosen, of the codecs in `CALIBRATED`.
        rank: of `low-rank`.
        strength: the scale of `compeft`, in standard deviations.
        bits_per_param: what `flex-switch` may spend.
        loss: what it learns by.
        recipe: how it learns.
        quantiser: of its recipe `paper`.
        tensor_density: glob over tensor names → density of those, the first match counts; 0 leaves a tensor out.
    """

    codec: CodecName = CodecName.T_SWITCH
    density: float = 0.05
    knob: Knob = Knob.L1
    rank: int = 8
    strength: float = 1.0
    bits_per_param: float = 0.04
    loss: Loss = Loss.KL
    recipe: FlexRecipe = FlexRecipe.BUDGET
    quantiser: Quantiser = Quantiser.SIGNED
    tensor_density: Mapping[str, float] = field(default_factory=dict)

    def params(self) -> dict[str, str | int | float | bool]:
        """What the expert's header says of the settings that its codec used."""
        used: dict[CodecName, dict[str, str | int | float | bool]] = {
            CodecName.T_SWITCH: {"knob": self.knob.value, "density": self.density},
            CodecName.FLEX_SWITCH: self._flex_params(),
            CodecName.COMPEFT: {"density": self.density, "strength": self.strength},
            CodecName.BIT_DELTA: {"knob": self.knob.value},
            CodecName.LOW_RANK: {"rank": self.rank},
            CodecName.RAW: {},
            CodecName.OVERWRITE: {},
        }
        return used[self.codec]

    def _flex_params(self) -> dict[str, str | int | float | bool]:
        found: dict[str, str | int | float | bool] = {"budget": self.bits_per_param, "loss": self.loss.value}
        if self.recipe is FlexRecipe.PAPER:
            found |= {"recipe": self.recipe.value, "quantiser": self.quantiser.value}
        return found

    def left_out(self, names: Iterable[str]) -> set[str]:
        """The tensors that `tensor_density` leaves out.

        Raises:
            InvalidRequestError: a glob matches nothing, or asks for a density of a codec that has none.
        """
        known = list(names)
        check_tensor_density(self.codec, self.tensor_density)
        for glob in self.tensor_density:
            if not any(fnmatchcase(name, glob) for name in known):
                raise InvalidRequestError(f"no tensor of the base matches {glob}", param="tensor_density")
        return {name for name in known if self._density_of(name) == 0.0}

    def _density_of(self, name: str) -> float | None:
        return next((value for glob, value in self.tensor_density.items() if fnmatchcase(name, glob)), None)

    def chooser(
        self, names: Iterable[str], deltas: Callable[[], Iterable[tuple[str, torch.Tensor]]]
    ) -> Callable[[str, tuple[int, ...]], Codec | None]:
        """The function that says which codec packs a tensor of that name and shape; None leaves it out.

        Args:
            names: every tensor of the base.
            deltas: reads the task vector, for the codecs that look at all of it first.

        Raises:
            InvalidRequestError: a setting is out of range; `param` names it.
        """
        left_out = self.left_out(names)
        codec = self._codec(deltas, left_out)
        start = Knob.RMS if self.knob is Knob.CALIBRATED else self.knob
        own = {value: TSwitch(value, start) for value in self.tensor_density.values() if value}

        def codec_for(tensor: str, shape: tuple[int, ...]) -> Codec | None:
            if tensor in left_out:
                return None
            if is_raw(shape):
                return Raw()
            density = self._density_of(tensor)
            return own[density] if density else codec

        return codec_for

    def _codec(self, deltas: Callable[[], Iterable[tuple[str, torch.Tensor]]], left_out: set[str]) -> Codec:
        if self.codec is CodecName.COMPEFT:
            matrices = (
                (name, delta) for name, delta in deltas() if name not in left_out and not is_raw(tuple(delta.shape))
            )
            return ComPEFT(matrices, self.density, self.strength)
        if self.codec is CodecName.BIT_DELTA:
            return BitDelta()
        if self.codec is CodecName.LOW_RANK:
            return LowRank(self.rank)
        if self.codec is CodecName.RAW:
            return Raw()
        return TSwitch(self.density, Knob.RMS if self.knob is Knob.CALIBRATED else self.knob)
