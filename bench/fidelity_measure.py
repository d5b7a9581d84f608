"""One cell of `bench.fidelity`: the expert is made, merged into the base offline, and scored on held-out rows."""

from __future__ import annotations

import hashlib
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bench.fidelity_cells import BASE, TUNED, Cell
from bench.fidelity_lora import train_lora
from examples.build import load_rows
from examples.evaluate import evaluate
from examples.finetune import load_base
from examples.tasks import TASKS
from examples.tasks.task import EXEMPLARS
from store import learning, paper_course
from store.apply import apply_expert
from store.convert import compress
from store.expert_file import read_header
from store.teacher import Lesson, listen, mean_kl

KL_ROWS = 32
"""Held-out prompts whose answers' KL is taken."""


class Bench:
    """One model in memory that takes the weights of every cell in turn, and what is known of the tasks.

    Args:
        base: the base's folder.
        tuned: a folder with one fine-tune per task in it.
        experts: where expert files go.
        cache: of the base's fingerprint.
        rows: held-out rows per score.
        exemplars: prompts to learn from.
    """

    def __init__(
        self, base: Path, tuned: Path, experts: Path, cache: Path, rows: int, exemplars: int = EXEMPLARS
    ) -> None:
        self._base, self._tuned, self._experts, self._cache = base, tuned, experts, cache
        self._rows, self._exemplars = rows, exemplars
        self._heard: tuple[str, list[Lesson]] | None = None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = load_base(self._base, torch.device("cpu"))
        return model.eval(), tokenizer

    @property
    def model(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    def identity(self, cell: Cell) -> str:
        """What a measurement depends on: the fine-tune, the settings, those of the learning, the number of rows."""
        trained = (self._tuned / cell.task / "finetune.json").read_bytes()
        settings = [dict(cell.method.options), cell.method.lora_rank, self._rows, self._exemplars]
        if cell.method.lora_rank:
            settings.append("bfloat16")
        if cell.method.options.get("codec") == "flex-switch":
            settings.append({name: value for name, value in sorted(vars(learning).items()) if name.isupper()})
        if "recipe" in cell.method.options:
            settings.append({name: value for name, value in sorted(vars(paper_course).items()) if name.isupper()})
        return hashlib.sha256(trained + repr(settings).encode()).hexdigest()[:16]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Make the expert and score it."""
        # The fine-tune's answers come first: whatever is loaded then stays.
        lessons = self._lessons(cell.task) if cell.method != BASE else None
        made = self._make(cell)
        task = TASKS[cell.task]
        found = {"task": cell.task, "method": cell.method.name, "size": cell.size} | made
        if lessons is not None:
            found["kl"] = mean_kl(self.model, lessons)
        rows = load_rows(task, "test")[: self._rows]
        return found | {"rows": len(rows), "score": evaluate(self.model, self.tokenizer, rows, task.score)}

    def _lessons(self, task: str) -> list[Lesson]:
        if self._heard is None or self._heard[0] != task:
            self._load(load_file(self._tuned / task / "model.safetensors"))
            prompts = [row["prompt"] for row in load_rows(TASKS[task], "test")[:KL_ROWS]]
            self._heard = task, listen(self.model, self.tokenizer, prompts)
        return self._heard[1]

    def _load(self, state: dict[str, torch.Tensor]) -> None:
        self.model.load_state_dict(state, strict=False)
        self.model.tie_weights()

    def _make(self, cell: Cell) -> dict[str, Any]:
        """Leave the model with the cell's weights; what they take."""
        if cell.method in (BASE, TUNED):
            self._load(
                load_file((self._base if cell.method == BASE else self._tuned / cell.task) / "model.safetensors")
            )
            return {}
        path = self._experts / f"{cell.key}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        started, worked = time.monotonic(), time.process_time()
        tuned, options = self._tuned / cell.task, cell.method.options
        if cell.method.lora_rank:
            tuned = path.with_suffix(".adapter")
            train_lora(self._base, TASKS[cell.task], cell.method.lora_rank, tuned)
            options = {"codec": "low-rank"}
        exemplars = [row["prompt"] for row in load_rows(TASKS[cell.task], "train")[: self._exemplars]]
        compress(self._base, tuned, path, exemplars=exemplars, name=cell.task, cache_dir=self._cache, **options)
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - worked
        self._load(apply_expert(path, self._base, cache_dir=self._cache))
        header, size = read_header(path), path.stat().st_size
        learned = {key: value for key, value in header.codec_params.items() if key.startswith("kl")}
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "bytes": size,
            "times_smaller": 2 * parameters / size,
            "density": header.density,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            **{f"exemplar_{key}": value for key, value in learned.items()},
        }
