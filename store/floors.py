"""Floors: how close to its fine-tune an expert must come, or it is not written."""

from __future__ import annotations

from dataclasses import dataclass

from store.errors import InvalidRequestError
from store.measured import Measured

BELOW_FLOOR = "below_floor"
"""The code of the error that an unmet floor gives."""


@dataclass(frozen=True)
class Floors:
    """What an expert must reach; None asks nothing.

    Attributes:
        max_kl: nats per answer token that it may be away from its fine-tune.
        min_agreement: share of its fine-tune's greedy answers that it must give, 0 to 1.
        min_retention: share of its fine-tune's gain over the base that it must keep.
    """

    max_kl: float | None = None
    min_agreement: float | None = None
    min_retention: float | None = None

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return any(value is not None for value in vars(self).values())

    def check_measurable(self, exemplars: bool, labelled: bool) -> None:
        """Raise InvalidRequestError if a floor is given that will not be measured: to be told before the work."""
        for name, value in (("max_kl", self.max_kl), ("min_agreement", self.min_agreement)):
            if value is not None and not exemplars:
                raise InvalidRequestError(f"{name} is measured on exemplars: give some", param=name)
        if self.min_agreement is not None and not 0.0 <= self.min_agreement <= 1.0:
            raise InvalidRequestError(f"min_agreement must be 0 to 1, not {self.min_agreement}", param="min_agreement")
        if self.min_retention is not None and not labelled:
            raise InvalidRequestError(
                "min_retention is measured on labelled exemplars, prompts with their answers: give some",
                param="min_retention",
            )

    def check(self, measured: Measured) -> None:
        """Refuse an expert below a floor.

        Raises:
            InvalidRequestError: it is; `code` is `BELOW_FLOOR` unless no budget would help.
        """
        if self.max_kl is not None and not (measured.kl is not None and measured.kl <= self.max_kl):
            self._fail("max_kl", f"the expert would answer {measured.kl:.4f} nats per token away from its fine-tune")
        if self.min_agreement is not None and not (
            measured.agreement is not None and measured.agreement >= self.min_agreement
        ):
            self._fail("min_agreement", f"the expert would give {measured.agreement:.1%} of its fine-tune's answers")
        if self.min_retention is None:
            return
        if (retention := measured.retention) is None:
            raise InvalidRequestError(
                f"the fine-tune scores {measured.fine_tune_score:.3f} on the labelled exemplars and the base "
                f"{measured.base_score:.3f}: there is no gain of which min_retention could be kept",
                param="labelled",
            )
        if not retention >= self.min_retention:
            self._fail("min_retention", f"the expert would keep {retention:.1%} of its fine-tune's gain")

    def _fail(self, name: str, what: str) -> None:
        raise InvalidRequestError(
            f"{what}, and {name} allows {getattr(self, name)}: give it a higher density, budget or rank, or take a "
            "codec that keeps more",
            param=name,
            code=BELOW_FLOOR,
        )
