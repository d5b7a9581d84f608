"""When things happened to a request inside the engine: what queues, loads and patches cost it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Of one sequence, by `time.monotonic`, in seconds.

    Attributes:
        arrived: when the engine took it in.
        granted: when all its experts were on the device.
        scheduled: when its first step began.
        answered: when its first token was there.
        patching: seconds of its first steps that went into building the weights of its mix.
    """

    arrived: float
    granted: float
    scheduled: float
    answered: float
    patching: float
