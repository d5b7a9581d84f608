"""What was measured of an expert against its fine-tune, as a value and as JSON in the file's header. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from store.strict_json import Fields

_DIGITS = 6
"""Significant digits kept: what lies beyond differs from machine to machine."""
_PLACES = 9
"""Of a retention: (0.6 − 0.2) / (1.0 − 0.2) is a half, which floats miss."""
_MOST = 1e9
_MAX_PROMPTS = 1 << 20


@dataclass(frozen=True)
class Measured:
    """How close an expert comes to its fine-tune. What was not measured is None.

    Attributes:
        relative_error: ‖τ − τ̃‖ / ‖τ‖ over all parameters.
        kl: mean KL(fine-tune ‖ expert) in nats per token of the fine-tune's greedy answers.
        agreement: share of these answers that are the expert's own greedy answers, token for token.
        prompts: how many prompts `kl` and `agreement` are of.
        held_out: whether the expert was made without these prompts.
        score, base_score, fine_tune_score: exact match on the labelled exemplars, 0 to 1.
        labelled: how many these are.
    """

    relative_error: float
    kl: float | None = None
    agreement: float | None = None
    prompts: int | None = None
    held_out: bool | None = None
    score: float | None = None
    base_score: float | None = None
    fine_tune_score: float | None = None
    labelled: int | None = None

    @property
    def retention(self) -> float | None:
        """(score − base's) / (fine-tune's − base's); None if not measured, or where the fine-tune gains nothing."""
        if self.score is None or self.base_score is None or self.fine_tune_score is None:
            return None
        gain = self.fine_tune_score - self.base_score
        return round((self.score - self.base_score) / gain, _PLACES) if gain > 0 else None


LONGEST = Measured(1.23457e-05, 9.81276e-05, 0.0938251, _MAX_PROMPTS, False, 0.0471369, 0.0260583, 0.0159284, 1039728)
"""One that takes as much room as any."""


def measured_to_json(measured: Measured) -> dict[str, float | int | bool]:
    """Keys and values in canonical order; what was not measured is left out."""
    return {
        key: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
        for key, value in vars(measured).items()
        if value is not None
    }


def figures(measured: Measured) -> dict[str, float | int | bool]:
    """The same with the retention, which follows from the scores."""
    retention = measured.retention
    return measured_to_json(measured) | ({} if retention is None else {"retention": float(f"{retention:.{_DIGITS}g}")})


def rounded(measured: Measured) -> Measured:
    """With the digits that a file keeps, so that what is said equals what is stored."""
    return Measured(**measured_to_json(measured))  # type: ignore[arg-type]


def measured_from_json(fields: Fields) -> Measured:
    """Read what `measured_to_json` wrote.

    Raises:
        FieldError: naming the field.
    """
    found: dict[str, float | int | bool] = {"relative_error": fields.number("relative_error", low=0.0, high=_MOST)}
    if fields.has("kl"):
        found["kl"] = fields.number("kl", low=0.0, high=_MOST)
    for key in ("agreement", "score", "base_score", "fine_tune_score"):
        if fields.has(key):
            found[key] = fields.number(key, low=0.0, high=1.0)
    for key in ("prompts", "labelled"):
        if fields.has(key):
            found[key] = fields.integer(key, low=1, high=_MAX_PROMPTS)
    if fields.has("held_out"):
        held_out = fields.get("held_out")
        if not isinstance(held_out, bool):
            fields.fail("held_out", "must be true or false")
        found["held_out"] = held_out
    return Measured(**found)  # type: ignore[arg-type]
