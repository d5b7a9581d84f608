"""The base alone, end to end: our scheduler, cache and steps against transformers' own continuous batching."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transformers import GenerationConfig

from bench.gpu_bench import Bench
from bench.gpu_lab import Work
from bench.report import Bar, Row, bar
from server.engine.attention import ATTENTION_NAME
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.types import EngineRequest, SamplingParams
from store.mix import BASE_MIX

_REQUESTS = 32
_STEP_TOKENS = 2048
_tenants = itertools.count()


def peers(bench: Bench) -> tuple[list[Row], list[Bar]]:
    """Requests of one length, all there at once, greedy; prompts are computed too, and counted in neither. By the wall
    clock, with everything made, captured and warmed up before."""
    prompt, answer = (128, 128) if bench.lab.on_gpu else (20, 6)
    rounds = itertools.count()

    def prompts() -> list[list[int]]:
        """Others in every round: none may find in a cache what was computed in the one before."""
        first = next(rounds)
        places = range(first, first + prompt)
        return [[(31 * number + 7 * place) % bench.model.vocabulary for place in places] for number in range(_REQUESTS)]

    theirs = Theirs(bench, answer)
    try:
        theirs.run(prompts())
        works: dict[str, list[Work]] = {
            "ours": [lambda: ours(bench, prompts(), answer)],
            "transformers": [lambda: theirs.run(prompts())],
        }
        taken = bench.lab.wall_seconds(works, 3 if bench.lab.on_gpu else 1)
    finally:
        theirs.close()
    ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken["transformers"], strict=True))
    rows: list[Row] = [
        {"what": "end to end", "engine": name, "requests": _REQUESTS, "prompt": prompt, "answer": answer,
         "tokens/s": _REQUESTS * answer / statistics.median(seconds),
         "set-up included": name != "ours" and not theirs.is_kept}
        for name, seconds in taken.items()
    ]  # fmt: skip
    what = "end-to-end decode of the base, in the throughput of transformers' own continuous batching"
    return rows, [bar("gpu.end_to_end", what, ratio, ">=", 1.0)]


def ours(bench: Bench, prompts: list[list[int]], answer: int) -> int:
    """Run the requests through scheduler and executor; how many tokens were generated."""
    scheduler = Scheduler(bench.cache, max_batch=_REQUESTS, step_tokens=_STEP_TOKENS, turn_steps=32)
    sampling = SamplingParams(answer, 0.0, ignore_eos=True)
    for prompt in prompts:
        # A tenant for each: what was computed in one round must not be found in the next.
        request = EngineRequest(tuple(prompt), sampling, BASE_MIX, tenant=f"{next(_tenants)}")
        scheduler.add(Sequence(request, answer, emit=lambda _: None))
    generated = 0
    while (batch := scheduler.schedule(mixed=True)) is not None:
        choices = iter(bench.executor.run(batch, {}))
        for item in batch.work:
            samples = item.samples
            item.sequence.computed += item.count
            if not samples:
                continue
            choice = next(choices)
            assert choice is not None
            generated += 1
            if item.sequence.append(choice.token).finish is not None:
                scheduler.remove(item.sequence)
    return generated


class Theirs:
    """transformers' continuous batching over the same weights.

    Attributes:
        is_kept: whether its manager is made once, as a server would; else every batch makes and ends one.
    """

    def __init__(self, bench: Bench, answer: int) -> None:
        self._network = cast(Any, bench.model.network)
        self._config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        self._options: dict[str, Any] = {}
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:  # older ones take no such settings
            pass
        else:
            memory: dict[str, Any] = {} if bench.lab.on_gpu else {"num_blocks": 64, "max_batch_tokens": 256}
            self._options["continuous_batching_config"] = ContinuousBatchingConfig(**memory)
        self.is_kept = hasattr(self._network, "init_continuous_batching")
        self._attention = "sdpa"  # it takes flash attention by itself where that is installed
        self._manager: Any = None
        if self.is_kept:
            with self._attending():
                self._manager = self._network.init_continuous_batching(self._config, **self._options)
                self._attention = self._network.config._attn_implementation
                if hasattr(self._manager, "warmup"):
                    self._manager.warmup()
                self._manager.start()

    def run(self, prompts: list[list[int]]) -> int:
        """Answer the prompts; how many tokens were generated.

        Raises:
            RuntimeError: a request has failed, or what runs them has ended.
        """
        with self._attending():
            if self._manager is None:
                made = self._network.generate_batch(
                    prompts, generation_config=self._config, progress_bar=False, **self._options
                )
                return sum(len(one.generated_tokens) for one in made.values())
            self._manager.add_requests(prompts, max_new_tokens=self._config.max_new_tokens)
            left, generated = len(prompts), 0
            while left:
                one = self._manager.get_result(timeout=1)
                failed = None if one is None else one.error
                if failed is not None or (one is None and not self._manager.is_running()):
                    raise RuntimeError(f"transformers' continuous batching has failed: {failed or 'it ended'}")
                if one is not None and one.is_finished():
                    left, generated = left - 1, generated + len(one.generated_tokens)
            return generated

    def close(self) -> None:
        """Give back what it holds."""
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager = None
            self._network.set_attn_implementation(ATTENTION_NAME)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Within, the network attends as its manager wants it. Takes less than a thousandth of a round."""
        self._network.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            self._network.set_attn_implementation(ATTENTION_NAME)
