"""The base alone, end to end: our scheduler, cache and steps against transformers' own continuous batching."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

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
    """Requests of one length, all there at once, greedy; prompts are computed too, and counted in neither."""
    prompt, answer = (128, 128) if bench.lab.on_gpu else (20, 6)
    prompts = [
        [(31 * number + 7 * place) % bench.model.vocabulary for place in range(prompt)] for number in range(_REQUESTS)
    ]
    works: dict[str, list[Work]] = {
        "ours": [lambda: ours(bench, prompts, answer)],
        "transformers": [lambda: theirs(bench, prompts, answer)],
    }
    taken = bench.lab.wall_seconds(works, 3 if bench.lab.on_gpu else 1)
    ratio = statistics.median(b / a for a, b in zip(taken["ours"], taken["transformers"], strict=True))
    rows: list[Row] = [
        {"what": "end to end", "engine": name, "requests": _REQUESTS, "prompt": prompt, "answer": answer,
         "tokens/s": _REQUESTS * answer / statistics.median(seconds)}
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


def theirs(bench: Bench, prompts: list[list[int]], answer: int) -> int:
    """The same with `generate_batch` over the same weights."""
    network: Any = bench.model.network
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    options: dict[str, Any] = {}
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError:  # older ones take no such settings
        pass
    else:
        memory: dict[str, Any] = {} if bench.lab.on_gpu else {"num_blocks": 64, "max_batch_tokens": 256}
        options["continuous_batching_config"] = ContinuousBatchingConfig(**memory)
    network.set_attn_implementation("sdpa")  # it takes flash attention by itself where that is installed
    try:
        made = network.generate_batch(prompts, generation_config=config, progress_bar=False, **options)
    finally:
        network.set_attn_implementation(ATTENTION_NAME)
    return sum(len(one.generated_tokens) for one in made.values())
