"""Routing features of several depths of the base in one pass, for benchmarks: as the engine computes them, but on
transformers' own forward, and what each depth costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.finetune import load_base
from router.features import Features

BATCH_TOKENS = 1024
PROMPT_TOKENS = 64
ROUNDS = 7

Place = tuple[int, int]
"""A layer, and over how many tokens at most the mean is taken; the first token is always left out."""

WHOLE: Place = (-1, PROMPT_TOKENS)
"""Stands for the forward pass that answers a prompt."""


class HiddenStates:
    """Routing features of every place at once, from one pass through the base, as the engine computes them."""

    def __init__(self, base: Path, layers: Sequence[int], windows: Sequence[int]) -> None:
        self.model, self._tokenizer = load_base(base, torch.device("cpu"))
        self.model.eval()
        self.decoder = self.model.get_decoder()
        self.norm, self.decoder.norm = self.decoder.norm, torch.nn.Identity()
        self.blocks = self.decoder.layers
        self._layers, self._windows = layers, windows
        self.decoder.layers = self.blocks[: max(layers)]

    def encode(self, text: str) -> list[int]:
        """Token ids, at most as many as the largest window holds."""
        ids: list[int] = self._tokenizer.encode(text)[: max(self._windows)]
        return ids

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> dict[Place, Features]:
        """`[len(texts), e]` for every layer and window."""
        encoded = [self.encode(text) for text in texts]
        found: dict[Place, list[Features]] = {
            (layer, window): [np.empty(0, np.float32)] * len(texts)
            for layer in self._layers
            for window in self._windows
        }
        for rows in batches([len(ids) for ids in encoded]):
            width = max(len(encoded[row]) for row in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, : len(encoded[row])] = torch.tensor(encoded[row])
                mask[i, : len(encoded[row])] = 1
            states = self.decoder(
                input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
            ).hidden_states
            for (layer, window), means in found.items():
                for i, row in enumerate(rows):
                    length = min(len(encoded[row]), window)
                    means[row] = states[layer][i, min(1, length - 1) : length].mean(dim=0).numpy()
        return {place: np.stack(means) for place, means in found.items()}


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of like lengths, at most BATCH_TOKENS padded tokens each."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not found or (len(found[-1]) + 1) * lengths[i] > BATCH_TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def costs(base: Path, layers: Sequence[int], windows: Sequence[int]) -> dict[Place, float]:
    """Milliseconds that the features of a prompt of PROMPT_TOKENS take, and at WHOLE the forward pass that answers it;
    medians of interleaved rounds."""
    states = HiddenStates(base, layers, windows)
    ids = torch.arange(1000, 1000 + PROMPT_TOKENS)[None]

    def early(layer: int, window: int) -> Callable[[], Any]:
        def run() -> None:
            states.decoder.layers, states.decoder.norm = states.blocks[:layer], torch.nn.Identity()
            states.decoder(input_ids=ids[:, :window], use_cache=False)

        return run

    def whole() -> None:
        states.decoder.layers, states.decoder.norm = states.blocks, states.norm
        states.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    runs: dict[Place, Callable[[], Any]] = {
        (layer, window): early(layer, window) for layer in layers for window in windows
    }
    runs[WHOLE] = whole
    took: dict[Place, list[float]] = {place: [] for place in runs}
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            for place, run in runs.items():
                start = time.perf_counter()
                run()
                took[place].append(1e3 * (time.perf_counter() - start))
    return {place: statistics.median(times[1:]) for place, times in took.items()}  # the first one warms up
