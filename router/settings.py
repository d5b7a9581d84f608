"""How prompts are matched with experts: every knob of the router."""

from __future__ import annotations

from dataclasses import dataclass

from router.metric import MetricKind
from router.mix import MixMode, Votes
from router.profile import LOWEST_QUANTILE


@dataclass(frozen=True)
class RouterSettings:
    """How prompts are matched with experts.

    Raises:
        ValueError: a value is out of range.
    """

    mode: MixMode = MixMode.TOP1
    """One expert, or a weighted mix. No measurement on language models is published for soft mixes."""
    votes: Votes = Votes.INVERSE
    """What a neighbour's vote weighs."""
    metric: MetricKind = MetricKind.DISCRIMINANT
    """Under which distances are taken; all but `plain` learn, and have the background compete."""
    rank: int = 64
    """Most rows of a learned metric (r)."""
    epochs: int = 100
    """Epochs of the metric `flex`."""
    frames: int = 2
    """Frames that exemplars are also seen in, besides without their instruction; 0 for exemplars as they are."""
    centres: int = 20
    """Most K-Means centres per expert (E; AFS recommends 20 to 40)."""
    background_centres: int = 140
    """Centres of what is no expert's."""
    background_parts: int = 60
    """Into how many kinds the background is split when the metric is fitted."""
    neighbours: int = 10
    """Nearest centres that a prompt is compared with (C; AFS recommends 10)."""
    min_share: float = 0.2
    """Soft mixes leave out experts with a smaller share of the votes."""
    steps: int = 5
    """Weights of soft mixes are multiples of 1/steps."""
    quantile: float = 0.98
    """Share of an expert's own held-out exemplars that lie within its reach."""
    margin: float = 3.0
    """Factor on every reach; larger accepts more prompts of either kind."""
    max_exemplars: int = 512
    """Exemplars beyond, evenly spread over the list, are left out."""
    feature_batch: int = 16
    """Exemplars per call of the featurizer."""
    seed: int = 0
    """Of K-Means."""

    @property
    def of_metric(self) -> str:
        """Those that decide which metric is fitted to given experts."""
        names = "metric rank epochs frames centres background_centres background_parts neighbours max_exemplars seed"
        return " ".join(f"{name}={getattr(self, name)}" for name in names.split())

    def __post_init__(self) -> None:
        positive = ("rank", "epochs", "centres", "background_centres", "background_parts", "neighbours", "steps")
        for name in (*positive, "max_exemplars", "feature_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.frames < 0:
            raise ValueError(f"frames must not be negative, as {self.frames} is")
        if not LOWEST_QUANTILE <= self.quantile <= 1:
            raise ValueError(f"quantile must be between {LOWEST_QUANTILE} and 1, not {self.quantile}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share must be between 0 and 1, not {self.min_share}")
        if not 0 < self.margin < float("inf"):
            raise ValueError(f"margin must be a positive number, not {self.margin}")
