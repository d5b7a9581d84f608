"""How many of a CPU's cores the steps get."""

from __future__ import annotations

import os

import torch


class Cores:
    """Sets the threads of torch, and so of steps, for the thread that makes it and calls it.

    The threads of a step wait for each other many times. If a core has to serve one of them and the thread that decodes
    an expert, all of them wait for that core; with one thread less, steps and that thread have a core each.
    """

    def __init__(self, threads: int | None) -> None:
        """Args:
        threads: of a step; None leaves torch's choice.
        """
        self._threads = threads or torch.get_num_threads()
        self._now = 0
        self.share(False)

    def share(self, decoding: bool) -> None:
        """For the next step.

        Args:
            decoding: whether an expert is being decoded.
        """
        spare = self._threads < _cores()
        wanted = self._threads if spare or not decoding else max(1, self._threads - 1)
        if wanted != self._now:
            torch.set_num_threads(wanted)
            self._now = wanted


def _cores() -> int:
    """Those that this process may run on; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
