"""How a fine-tune is to be compressed: every option once, for `POST /v1/jobs` and for the command line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from server.api.wire import Text, Wire
from store.codecs.base import CodecName, Loss
from store.codecs.flex_recipe import FlexRecipe, Quantiser
from store.codecs.t_switch import Knob
from store.compress_rules import MOST_BITS, MOST_RANK, check_together
from store.floors import Floors

_MAX_GLOBS, _MAX_GLOB = 256, 512

Glob = Annotated[Text, Field(min_length=1, max_length=_MAX_GLOB)]
Density = Annotated[float, Field(ge=0, le=1)]


class CompressOptions(Wire):
    """The options of `store.convert.compress` that say how; what is not given is left to it."""

    codec: Annotated[CodecName, Field(strict=False)] = Field(CodecName.T_SWITCH, description="The method.")
    density: float | None = Field(
        None, gt=0, le=1, description="Fraction of the weights that t-switch and compeft keep; default: 0.05."
    )
    tensor_density: dict[Glob, Density] | None = Field(
        None,
        max_length=_MAX_GLOBS,
        description="Another density for tensors whose names match a glob, the first that does; only t-switch has any "
        "but 0, which leaves a tensor out.",
    )
    bits_per_param: float | None = Field(
        None, gt=0, le=MOST_BITS, description="What flex-switch may spend per parameter of the base; default: 0.04."
    )
    max_size: Annotated[int, Field(ge=1)] | None = Field(None, description="The same as a size of the file in bytes.")
    loss: Annotated[Loss, Field(strict=False)] = Field(Loss.KL, description="What flex-switch learns by.")
    recipe: Annotated[FlexRecipe, Field(strict=False)] = Field(
        FlexRecipe.BUDGET, description="How flex-switch learns: by masks within an exact budget, or as published."
    )
    quantiser: Annotated[Quantiser, Field(strict=False)] = Field(
        Quantiser.SIGNED, description="Of the recipe paper; that of the paper may change signs at few bits."
    )
    rank: Annotated[int, Field(ge=1, le=MOST_RANK)] | None = Field(
        None, description="Of low-rank; default: 8, of an adapter its own factors as they are."
    )
    strength: float | None = Field(
        None, gt=0, le=1000, description="Scale of compeft, in standard deviations; default: 1."
    )
    knob: Annotated[Knob, Field(strict=False)] | None = Field(
        None, description="How magnitude is restored; default: calibrated with exemplars, else l1."
    )
    max_kl: float | None = Field(
        None, gt=0, description="Refuse an expert further from its fine-tune than that, in nats per answer token."
    )
    min_agreement: float | None = Field(
        None, ge=0, le=1, description="Refuse one that gives a smaller share of the fine-tune's greedy answers."
    )
    min_retention: float | None = Field(
        None, description="Refuse one that keeps a smaller share of the fine-tune's gain; needs labelled prompts."
    )
    widen: bool = Field(
        False,
        description="Where a floor is not met, try again with twice the density, budget or rank: five tries in all.",
    )

    def check(self, *, exemplars: bool, labelled: bool, stands: bool) -> None:
        """Whether the options go together, and with what else there is; see `store.compress_rules.check_together`.

        Raises:
            InvalidRequestError: they do not; `param` names one.
        """
        check_together(
            codec=self.codec, knob=self.knob, bits_per_param=self.bits_per_param, max_size=self.max_size,
            tensor_density=self.tensor_density or {},
            floors=Floors(self.max_kl, self.min_agreement, self.min_retention),
            exemplars=exemplars, labelled=labelled, stands=stands,
        )  # fmt: skip

    def given(self) -> dict[str, Any]:
        """The options that were given, by name, as JSON has them."""
        return self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
