"""The engine end to end on a tiny base with real expert files, against transformers on offline-merged models."""

from __future__ import annotations

import asyncio
import copy
import random
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from server.engine.engine import TransformersEngine
from server.engine.host_tier import HostTier
from server.engine.loader import ExpertLoader
from server.engine.options import Mode
from server.engine.sequence import Sequence
from server.engine.stream import EngineStream
from server.engine.types import EngineRequest, FinishReason, SamplingParams, TokenEvent
from store.errors import (
    ContextLengthError,
    EngineDeadError,
    ExpertUnavailableError,
    InvalidRequestError,
    QueueFullError,
    SwitchyardError,
)
from store.fingerprint import manifest_of
from store.mix import BASE_MIX, Mix
from store.tiers import Tier
from tests.engine.conftest import SETTINGS, Library, collect, running, until


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, 90))] for _ in range(count)]


def run(coroutine: object) -> None:
    asyncio.run(coroutine)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", Mode)
def test_a_storm_of_mixes_answers_like_each_merged_model_alone(library: Library, mode: Mode) -> None:
    """Different mixes, prompts longer than a step, cancellations in between: token for token in float32."""
    one, two, three = (library.add(seed) for seed in (1, 2, 3))
    mixes = [BASE_MIX, Mix.of({one: 1.0}), Mix.of({two: 1.0}), Mix.of({one: 0.5, three: -0.7}), Mix.of({two: 1.5})]

    async def body() -> None:
        async with running(library, replace(SETTINGS, mode=mode)) as engine:
            cases = [(prompt, mixes[i % len(mixes)]) for i, prompt in enumerate(prompts(20))]
            doomed = [engine.submit(EngineRequest(tuple(p), SamplingParams(200, 0.0), m)) for p, m in cases[:6]]
            answers = asyncio.gather(*(collect(engine, prompt, mix) for prompt, mix in cases))
            for stream in doomed:
                await anext(stream)
                await stream.aclose()
            for (prompt, mix), (tokens, finish) in zip(cases, await answers, strict=True):
                assert tokens == library.greedy(mix, prompt, 12)
                assert finish is (FinishReason.LENGTH if len(tokens) == 12 else FinishReason.STOP)
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            stats = engine.stats()
            assert stats.kv_bytes_used == 0
            assert stats.merged_steps > 0 or mode is not Mode.MERGED
            assert stats.mixed_steps > 0 or mode is not Mode.MIXED
            assert stats.merged_steps + stats.mixed_steps > 0

    run(body())


def test_memory_pressure_changes_no_answer(library: Library) -> None:
    """A cache of a few blocks forces preemption and recomputation."""
    expert = library.add(1)

    async def body() -> None:
        async with running(library) as engine:
            block = engine._worker.cache.shape.block_bytes
        async with running(library, replace(SETTINGS, kv_bytes=16 * block)) as engine:
            cases = [(p, mix) for p in prompts(6, seed=3) for mix in (BASE_MIX, Mix.of({expert: 1.0}))]
            answers = await asyncio.gather(*(collect(engine, p, mix, 40) for p, mix in cases))
            assert engine.stats().preemptions > 0
            for (prompt, mix), (tokens, _) in zip(cases, answers, strict=True):
                assert tokens == library.greedy(mix, prompt, 40)

    run(body())


def test_features_come_from_the_base_whatever_is_patched_in(library: Library) -> None:
    expert = library.add(1)

    async def body() -> None:
        async with running(library) as engine:
            before = await engine.features(["hello there", "other words", "x"])
            assert before.shape == (3, engine.base.feature_dim)
            assert before.dtype == np.float32
            stream = engine.submit(EngineRequest((1, 2), SamplingParams(300, 0.0), Mix.of({expert: 1.0})))
            await anext(stream)
            during = await engine.features(["hello there", "other words", "x"])
            await stream.aclose()
            np.testing.assert_allclose(before, during, rtol=1e-4, atol=1e-5)
            with pytest.raises(InvalidRequestError):
                await engine.features([""])

    run(body())


def test_embeddings_are_features_of_whole_texts(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            short, long = engine.tokenizer.encode("hello there"), list(range(250))
            vectors = await engine.embed([short, long])
            np.testing.assert_allclose(vectors[0], (await engine.features(["hello there"]))[0], rtol=1e-5, atol=1e-6)
            cut = await engine.embed([long[: SETTINGS.feature_tokens]])
            assert np.abs(vectors[1] - cut[0]).max() > 1e-3
            with pytest.raises(ContextLengthError, match="maximum context length is 512 tokens; the text has 513"):
                await engine.embed([[1] * 513])
            with pytest.raises(InvalidRequestError):
                await engine.embed([[260]])

    run(body())


def test_embeddings_that_wait_are_bounded_and_end_with_their_client(library: Library) -> None:
    """As answers are: a tenant that has none waiting is let in beyond the bound."""
    text = list(range(40))

    async def body() -> None:
        async with running(library, replace(SETTINGS, max_queue=2)) as engine:
            many = [asyncio.create_task(engine.embed([text] * 2000, "acme")) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError):
                await engine.embed([text], "acme")
            assert (await engine.embed([text], "globex")).shape == (1, engine.base.feature_dim)
            assert not any(task.done() for task in many)
            for task in many:
                task.cancel()
            await asyncio.gather(*many, return_exceptions=True)
            await until(lambda: engine._worker.features.empty)
            assert (await engine.embed([text], "acme")).shape == (1, engine.base.feature_dim)

    run(body())


def test_a_seed_fixes_a_sampled_answer_whatever_runs_beside_it(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            options = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
            alone = await collect(engine, [5, 6, 7], BASE_MIX, 20, **options)
            crowd = await asyncio.gather(
                collect(engine, [5, 6, 7], BASE_MIX, 20, **options),
                *(collect(engine, prompt, BASE_MIX, 20, temperature=1.0) for prompt in prompts(4)),
            )
            other = await collect(engine, [5, 6, 7], BASE_MIX, 20, **(options | {"seed": 8}))
            assert crowd[0] == alone
            assert other != alone

    run(body())


def test_penalties_biases_and_stops_reach_the_model_s_answers(library: Library) -> None:
    """Beside greedy neighbours, which must not notice."""

    async def body() -> None:
        async with running(library) as engine:
            plain = library.greedy(BASE_MIX, [5, 6, 7], 20)
            repeated = next(token for token in plain if plain.count(token) > 1)
            banned = tuple((token, -100.0) for token in set(plain))
            ask = partial(collect, engine, [5, 6, 7], BASE_MIX, 20)
            together = await asyncio.gather(
                ask(),
                ask(logit_bias=banned),
                ask(frequency_penalty=2.0, repetition_penalty=10.0),
                ask(stop_tokens=frozenset({plain[3]})),
                ask(stop_tokens=frozenset({plain[0]}), min_tokens=4),
                ask(logit_bias=((256, 100.0),)),
                ask(logit_bias=((256, 100.0),), ignore_eos=True),
                ask(logit_bias=((256, 100.0),), min_tokens=7),
            )
            answers = [tokens for tokens, _ in together]
            assert answers[0] == plain
            assert not set(answers[1]) & set(plain)
            assert answers[2].count(repeated) < plain.count(repeated)
            assert answers[3] == plain[: plain.index(plain[3])]
            assert len(answers[4]) >= 4
            assert plain[0] not in answers[4]
            assert together[5] == ([], FinishReason.STOP)
            assert together[6] == ([256] * 20, FinishReason.LENGTH)
            assert (len(answers[7]), together[7][1]) == (7, FinishReason.STOP)
            for name, sampling in (
                ("logit_bias", SamplingParams(logit_bias=((260, 1.0),))),
                ("stop_token_ids", SamplingParams(stop_tokens=frozenset({260}))),
            ):
                with pytest.raises(InvalidRequestError) as refused:
                    engine.submit(EngineRequest((1,), sampling))
                assert refused.value.param == name

    run(body())


def test_likelihoods_of_prompt_and_answer(library: Library) -> None:
    """As transformers has them on the merged model: over prompts longer than a step, and through preemptions."""
    mix = Mix.of({library.add(1): 1.0})

    async def ask(engine: TransformersEngine, prompt: list[int], most: int) -> list[TokenEvent]:
        sampling = SamplingParams(max_tokens=most, temperature=0.0, logprobs=2, prompt_logprobs=1)
        return [event async for event in engine.submit(EngineRequest(tuple(prompt), sampling, mix))]

    async def body() -> None:
        async with running(library) as engine:
            block = engine._worker.cache.shape.block_bytes
        model = library.merged(mix)
        async with running(library, replace(SETTINGS, kv_bytes=16 * block)) as engine:
            cases = [(prompt, most) for prompt in prompts(5, seed=3) for most in (0, 40)]
            answers = await asyncio.gather(*(ask(engine, *case) for case in cases))
            assert engine.stats().preemptions > 0
            with pytest.raises(ContextLengthError):
                engine.submit(EngineRequest((1,) * 513, SamplingParams(max_tokens=0)))
        for (prompt, most), events in zip(cases, answers, strict=True):
            said = [event.likelihood.token for event in events if event.likelihood is not None]
            with torch.inference_mode():
                expected = model(torch.tensor([prompt + said])).logits[0].log_softmax(dim=-1)
            assert all(not event.prompt for event in events[1:])
            assert (events[0].prompt[0].token, events[0].prompt[0].logprob) == (prompt[0], None)
            told = [*events[0].prompt[1:], *(event.likelihood for event in events if event.likelihood is not None)]
            assert [one.token for one in told] == (prompt + said)[1:]
            for row, one in zip(expected, told, strict=False):
                assert one.logprob == pytest.approx(row[one.token].item(), abs=1e-3)
                assert one.best[0][1] == pytest.approx(row.max().item(), abs=1e-3)
            assert [len(one.best) for one in told] == [1] * (len(prompt) - 1) + [2] * len(said)
            if not most:
                assert events == [TokenEvent(None, FinishReason.LENGTH, prompt=events[0].prompt)]

    run(body())


def test_closing_a_stream_stops_its_compute(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            stream = engine.submit(EngineRequest((1,), SamplingParams(400, 0.0)))
            await anext(stream)
            await stream.aclose()
            await until(lambda: engine.stats().running == 0)
            steps = engine.stats().steps
            await asyncio.sleep(0.05)
            assert engine.stats().steps == steps
            assert engine.stats().kv_bytes_used == 0
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(body())


def test_a_full_queue_and_a_long_prompt_are_refused_at_once(library: Library) -> None:
    async def body() -> None:
        async with running(library, replace(SETTINGS, max_queue=2)) as engine:
            streams = [engine.submit(EngineRequest((1,), SamplingParams(400, 0.0))) for _ in range(2)]
            with pytest.raises(QueueFullError) as refused:
                engine.submit(EngineRequest((1,)))
            assert refused.value.retry_after >= 1
            other = engine.submit(EngineRequest((1,), SamplingParams(1, 0.0), tenant="other"))
            assert len([event async for event in other]) == 1, "who has nothing in the queue is not shut out by it"
            for stream in streams:
                await stream.aclose()
            with pytest.raises(ContextLengthError):
                engine.submit(EngineRequest(tuple(range(250)) * 3))
            # Clients know OpenAI's words: LiteLLM makes an exception of its own of them.
            with pytest.raises(ContextLengthError, match="this model's maximum context length is 512 tokens"):
                engine.submit(EngineRequest((1,) * 500, SamplingParams(max_tokens=100)))
            with pytest.raises(InvalidRequestError):
                engine.submit(EngineRequest(()))
            with pytest.raises(InvalidRequestError, match="token ids"):
                engine.submit(EngineRequest((1, 260)))
            assert len((await collect(engine, [1, 2], BASE_MIX, 5))[0]) <= 5

    run(body())


def test_broken_experts_fail_alone(library: Library) -> None:
    """Missing bytes, rotten bytes and an expert that makes the model overflow: each an error, the rest goes on."""
    healthy, rotten, wild = library.add(1), library.add(4), library.add(5, scale=1e12)
    path = library.files[rotten]
    path.write_bytes(path.read_bytes()[:-7])

    async def body() -> None:
        async with running(library) as engine:
            background = asyncio.create_task(collect(engine, [9, 9], Mix.of({healthy: 1.0}), 60))
            for digest in ("0" * 64, rotten, wild):
                with pytest.raises((ExpertUnavailableError, InvalidRequestError)):
                    await collect(engine, [1, 2, 3], Mix.of({digest: 1.0}))
            assert (await background)[0] == library.greedy(Mix.of({healthy: 1.0}), [9, 9], 60)
            assert engine.alive
            assert (await collect(engine, [3], BASE_MIX))[0] == library.greedy(BASE_MIX, [3], 12)

    run(body())


def test_a_failing_step_ends_its_requests_and_spares_the_server(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with running(library) as engine:
            executor = engine._worker.executor
            working = executor.run
            monkeypatch.setattr(executor, "run", lambda *_: (_ for _ in ()).throw(MemoryError("injected")))
            with pytest.raises(Exception, match="the engine failed on this batch"):
                await collect(engine, [1], BASE_MIX)
            monkeypatch.setattr(executor, "run", working)
            assert (await collect(engine, [3], BASE_MIX))[0] == library.greedy(BASE_MIX, [3], 12)
            assert engine.stats().kv_bytes_used == 0

    run(body())


def test_a_request_without_memory_for_its_next_step_ends_and_spares_the_server(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with running(library) as engine:
            cache = engine._worker.cache
            working = cache.grow

            def grow(sequence: Sequence, tokens: int) -> bool:
                if sequence.request.tenant == "unlucky":
                    raise torch.OutOfMemoryError("injected")
                return working(sequence, tokens)

            monkeypatch.setattr(cache, "grow", grow)
            beside = asyncio.create_task(collect(engine, [3], BASE_MIX, 60))
            unlucky = engine.submit(EngineRequest((1,), SamplingParams(4, 0.0), tenant="unlucky"))
            with pytest.raises(SwitchyardError, match="the engine failed on this batch"):
                await anext(unlucky)
            assert (await beside)[0] == library.greedy(BASE_MIX, [3], 60)
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            assert engine.stats().kv_bytes_used == 0
            assert engine.alive

    run(body())


def test_experts_of_clients_that_have_gone_are_not_fetched(library: Library) -> None:
    """Of those that wait behind a load that takes its time."""
    slow, wanted, *others = (library.add(seed) for seed in range(1, 7))
    gate, read = threading.Event(), []

    def fetch(digest: str) -> bytes:
        read.append(digest)
        assert digest != slow or gate.wait(60)
        return library.read(digest)

    def ask(engine: TransformersEngine, digest: str) -> EngineStream:
        return engine.submit(EngineRequest((1, 2), SamplingParams(4, 0.0), Mix.of({digest: 1.0})))

    async def body() -> None:
        engine = TransformersEngine(library.base, name="tiny", settings=SETTINGS, read_expert=fetch)
        await engine.start()
        try:
            first = ask(engine, slow)
            await until(lambda: read == [slow])
            gone = [ask(engine, digest) for digest in others]
            for stream in gone:
                await stream.aclose()
            live = ask(engine, wanted)
            await first.aclose()
            gate.set()
            assert [event.token async for event in live]
            assert set(read) == {slow, wanted}
            await until(lambda: engine.stats().waiting == 0)
        finally:
            await engine.stop()

    run(body())


def test_a_dead_thread_is_noticed_by_everyone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with running(library) as engine:
            stream = engine.submit(EngineRequest((1,), SamplingParams(400, 0.0)))
            await anext(stream)
            monkeypatch.setattr(engine._worker.scheduler, "schedule", lambda **_: 1 // 0)
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass
            await until(lambda: not engine.alive)
            with pytest.raises(EngineDeadError):
                engine.submit(EngineRequest((1,)))

    run(body())


def test_a_request_that_meets_the_end_of_the_thread_does_not_hang(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`alive` may still be true when the thread has taken its last command."""

    async def body() -> None:
        async with running(library) as engine:
            await engine.stop()
            monkeypatch.setattr(type(engine), "alive", True)
            with pytest.raises(EngineDeadError):
                engine.submit(EngineRequest((1,)))
            with pytest.raises(EngineDeadError):
                await engine.features(["hello"])

    run(body())


def test_a_step_is_held_back_for_a_load_that_is_about_to_end(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it brings is taken in before the step."""
    engine = TransformersEngine(library.base, name="tiny", settings=SETTINGS, read_expert=library.read)
    worker = engine._worker
    done: list[str] = []

    def patience(step_seconds: float) -> float:
        if done == ["a request"]:
            threading.Timer(0.2, worker.post, [lambda: done.append("its expert")]).start()
            return 60.0
        return 0.0

    monkeypatch.setattr(worker._bus, "patience", patience)
    worker.post(lambda: done.append("a request"))
    worker._receive()
    assert done == ["a request", "its expert"]


def test_stopping_ends_open_streams(library: Library) -> None:
    async def body() -> None:
        async with running(library) as engine:
            stream = engine.submit(EngineRequest((1,), SamplingParams(400, 0.0)))
            await anext(stream)
            await engine.stop()
            with pytest.raises(EngineDeadError):
                async for _ in stream:
                    pass

    run(body())


def test_a_dropped_expert_leaves_memory_once_unused(library: Library) -> None:
    expert = library.add(6)

    async def body() -> None:
        async with running(library) as engine:
            await collect(engine, [1], Mix.of({expert: 1.0}))
            await until(lambda: engine.stats().tier(Tier.DEVICE).experts == 1)
            assert engine.stats().tier(Tier.DEVICE).used_bytes
            await engine.drop_expert(expert)
            await until(lambda: engine.stats().tier(Tier.DEVICE).experts == 0)
            assert engine.stats().tier(Tier.DEVICE).used_bytes == 0

    run(body())


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_reduced_precision_follows_its_own_merged_model(library: Library, dtype: str) -> None:
    """In bfloat16 the tolerance is on logits, not tokens: the first token's margin decides."""
    expert = library.add(1)

    async def body() -> None:
        async with running(library, replace(SETTINGS, dtype=dtype)) as engine:
            assert engine.base.dtype == dtype
            mix = Mix.of({expert: 1.0})
            model = copy.deepcopy(library.merged(mix)).to(torch.bfloat16)
            agree = 0
            for prompt in prompts(12, seed=5):
                with torch.inference_mode():
                    logits = model(torch.tensor([prompt])).logits[0, -1].float()
                (tokens, _) = await collect(engine, prompt, mix, 1)
                chosen = logits[tokens[0]] if tokens else logits[256]
                assert logits.max() - chosen < 0.15
                agree += bool(logits.max() == chosen)
            assert agree >= 10

    run(body())


def test_experts_that_leave_the_device_come_back_from_host_memory(library: Library) -> None:
    """With room for one on the device and one beside it, each file is decoded once, and answers stay the same."""
    experts = [library.add(seed) for seed in (1, 2)]
    sizes = [ExpertLoader(manifest_of(library.base, None), torch.device("cpu"), library.read, HostTier(0))
             .decoded_bytes(digest) for digest in experts]  # fmt: skip
    settings = replace(SETTINGS, expert_bytes=max(sizes), host_expert_bytes=max(sizes))

    async def body() -> None:
        async with running(library, settings) as engine:
            for _ in range(3):
                for digest in experts:
                    mix = Mix.of({digest: 1.0})
                    tokens, _ = await collect(engine, [5, 6, 7], mix)
                    assert tokens == library.greedy(mix, [5, 6, 7], 12)
            await until(lambda: engine.stats().tier(Tier.DEVICE).loads == 6)
            host = engine.stats().tier(Tier.HOST)
            assert (host.hits, host.misses, host.faults) == (4, 2, 0)
            assert host.used_bytes == sizes[0], "the one that is not on the device"
            assert engine.holdings() == {Tier.DEVICE: frozenset(experts[1:]), Tier.HOST: frozenset(experts[:1])}
            await engine.drop_expert(experts[0])
            await until(lambda: not engine.holdings()[Tier.HOST])

    run(body())
