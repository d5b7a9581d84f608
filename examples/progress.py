"""Progress of a training run: a bar on a terminal, one plain line every ten steps elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich import progress as rich_progress

LINE_EVERY = 10
SMOOTHING = 0.9


class Progress:
    """Shows step, smoothed loss, tokens per second of the whole run so far, and the time that is left."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._step, self._first = name, total, done, done
        self._loss: float | None = None
        self._tokens = 0
        self._start = time.perf_counter()
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tok/s"),
            rich_progress.TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(name, total=total, completed=done, loss=float("nan"), speed=0.0)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: float, tokens: int) -> None:
        """Count one step that had this loss and computed this many tokens."""
        self._step += 1
        self._tokens += tokens
        self._loss = loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * loss
        seconds = time.perf_counter() - self._start
        speed = self._tokens / seconds
        self._bar.update(self._task, completed=self._step, loss=self._loss, speed=speed)
        if self._bar.disable and (self._step % LINE_EVERY == 0 or self._step == self._total):
            left = seconds / (self._step - self._first) * (self._total - self._step)
            line = f"{self._name} {self._step}/{self._total} loss {self._loss:.4f}"
            print(f"{line} {speed:.0f} tok/s {left:.0f} s left", flush=True)
