"""The comparison with other servers: its traces, its adapters, and the PEFT server around a tiny base."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench.peers.adapters import MODULES, factors, write_adapter
from bench.peers.measure import OURS, OURS_INT4, QUICK, measure
from bench.peers.peft_server import Generator, Waiting
from bench.peers.replay import SHORT, Answer, Peer, Replay, WrongAnswerError, decode_speed, replay
from bench.peers.servers import Subject, peft
from bench.peers.trace import LENGTHS, Asked, mixed, one_each
from examples.tasks import TASKS, Row
from tests.tiny import save_base, save_tuned

RANK = 64
"""More than any matrix of the tiny base has, so that adapters lose nothing."""
NAMES = ("one", "two")


def rows(name: str) -> list[Row]:
    return [Row(prompt=f"{name} {place}?", answer="") for place in range(200)]


class TestTrace:
    """What is asked."""

    tests: ClassVar = {name: rows(name) for name in ("a", "b", "c", "d")}

    def test_experts_are_asked_by_zipfs_law(self) -> None:
        """Of four, by 1/rank: 48, 24, 16 and 12 of a hundred."""
        many = {name: rows(name) * 10 for name in self.tests}
        counts = Counter(asked.expert for asked in mixed(many, 2000, seed=0))
        assert [counts[name] / 2000 for name in many] == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.04)

    def test_rounds_are_the_same_work_over_other_prompts(self) -> None:
        """Experts and lengths stay, no prompt comes twice in a round, and a seed always gives the same trace."""
        first, second = mixed(self.tests, 64, seed=0), mixed(self.tests, 64, seed=1)
        assert [(one.expert, one.max_tokens) for one in first] == [(one.expert, one.max_tokens) for one in second]
        assert [one.prompt for one in first] != [one.prompt for one in second]
        assert len({one.prompt for one in first}) == 64
        assert {one.max_tokens for one in first} == set(LENGTHS)
        assert first == mixed(self.tests, 64, seed=0)

    def test_more_prompts_than_there_are_is_an_error(self) -> None:
        """No prompt is quietly asked twice."""
        with pytest.raises(ValueError, match="there are 3"):
            mixed({"a": rows("a")[:3]}, 4, seed=0)

    def test_streams_name_each_expert_once(self) -> None:
        """All of one length."""
        assert [(one.expert, one.max_tokens) for one in one_each(self.tests, 7, 0)] == [(n, 7) for n in self.tests]


def test_factors_are_the_nearest_of_their_rank() -> None:
    """What is left out is what the exact decomposition leaves out."""
    torch.manual_seed(3)
    delta = torch.randn(40, 10) @ torch.randn(10, 60) + 0.01 * torch.randn(40, 60)
    down, up = factors(delta, 6)
    assert (down.shape, up.shape) == ((6, 60), (40, 6))
    least = torch.linalg.svdvals(delta)[6:].norm()
    assert float((delta - up @ down).norm()) == pytest.approx(float(least), rel=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A base, two fine-tunes of it, and their adapters."""
    folder = tmp_path_factory.mktemp("peers")
    base = save_base(folder / "base")
    tuned = {name: save_tuned(base, folder / name, seed=place) for place, name in enumerate(NAMES)}
    adapters = {name: write_adapter(base, tuned[name], folder / f"{name}-lora", RANK) for name in NAMES}
    return Subject(base, folder / "none.gguf", {}, tuned, adapters)


def merged(subject: Subject, name: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(subject.base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(subject.adapters[name])).merge_and_unload()


def test_peft_loads_an_adapter_and_gets_the_fine_tune(tiny: Subject) -> None:
    """Every linear layer becomes the fine-tune's; what adapters leave alone stays the base's."""
    got = merged(tiny, "one").state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(tiny.tuned["one"], dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny.base, dtype=torch.float32).state_dict()
    for name, tensor in got.items():
        expected = wanted if name.removesuffix(".weight").endswith(MODULES) else base
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_is_made_anew_when_its_fine_tune_changes(tiny: Subject, tmp_path: Path) -> None:
    """And is left as it is otherwise."""
    folder = write_adapter(tiny.base, tiny.tuned["one"], tmp_path / "lora", RANK)
    weights, tuned = folder / "adapter_model.safetensors", tiny.tuned["one"] / "model.safetensors"
    os.utime(weights, (tuned.stat().st_mtime + 10,) * 2)
    made = weights.stat().st_mtime
    assert write_adapter(tiny.base, tiny.tuned["one"], folder, RANK) == folder
    assert weights.stat().st_mtime == made
    os.utime(weights, (tuned.stat().st_mtime - 10,) * 2)
    write_adapter(tiny.base, tiny.tuned["one"], folder, RANK)
    assert weights.stat().st_mtime > tuned.stat().st_mtime


@pytest.fixture(scope="module")
def peer(tiny: Subject) -> Iterator[Peer]:
    """The server that users write around PEFT, as a process of its own."""
    with peft(tiny, sys.executable, mixed=False, dtype="float32") as peer:
        yield peer


TRACE = [Asked(name, f"prompt {place} here", 3 + place) for place, name in enumerate([*NAMES, None] * 2)]


def test_the_peft_server_answers_each_with_its_own_adapter(peer: Peer, tiny: Subject) -> None:
    """Asked all at once, in other lengths, each is what the merged model says alone."""
    answers = asyncio.run(replay(peer, TRACE, len(TRACE))).answers
    for asked, answer in zip(TRACE, answers, strict=True):
        assert (answer.text, answer.tokens) == (alone(tiny, asked), asked.max_tokens)


def test_an_unknown_adapter_is_no_answer(peer: Peer) -> None:
    """A replay does not count what a server refuses."""
    with pytest.raises(WrongAnswerError, match="404"):
        asyncio.run(replay(peer, [Asked("nobody", "hello", 3)], 1))


def test_decoding_is_what_a_long_answer_takes_longer_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    base, per_token = [1.5], [0.25]

    async def replayed(_: Peer, trace: list[Asked], concurrent: int) -> Replay:
        assert concurrent == 1
        return Replay(base[0] + per_token[0] * trace[0].max_tokens, ())

    monkeypatch.setattr("bench.peers.replay.replay", replayed)
    served = Peer("one", "http://nowhere", 0, lambda _: {})
    assert asyncio.run(decode_speed(served, Asked(None, "hello", SHORT + 20))) == 4.0
    per_token[0] = 0.0
    with pytest.raises(WrongAnswerError, match="no later"):
        asyncio.run(decode_speed(served, Asked(None, "hello", SHORT + 20)))


def test_a_mixed_batch_answers_each_with_its_own_adapter(tiny: Subject) -> None:
    """One batch, whose rows name the adapter or the base."""
    generator = Generator(tiny.base, tiny.adapters, "float32", max_batch=16, mixed=True)
    batch = [
        Waiting(asked.expert or "base", prompt_of(generator.tokenizer, asked), asked.max_tokens, ignore_eos=True)
        for asked in TRACE
    ]
    texts = [generator.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generator.generate(batch)]
    assert texts == [alone(tiny, asked) for asked in TRACE]


def prompt_of(tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[int]:
    chat = [{"role": "user", "content": asked.prompt}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])


def alone(subject: Subject, asked: Asked) -> str:
    """The greedy answer of the merged model, by transformers, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(subject.base)
    model = (
        AutoModelForCausalLM.from_pretrained(subject.base, dtype=torch.float32)
        if asked.expert is None
        else merged(subject, asked.expert)
    )
    prompt = torch.tensor([prompt_of(tokenizer, asked)])
    most = asked.max_tokens
    with torch.inference_mode():
        made = model.generate(prompt, max_new_tokens=most, min_new_tokens=most, do_sample=False)
    return str(tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True))


def test_a_peer_that_fails_on_the_way_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured to the end, and the rows say what was wrong; our own failures are not passed over."""

    async def stand_in(peer: Peer, trace: Sequence[Asked], _: int) -> Replay:
        if peer.name == failing and trace[0].max_tokens in LENGTHS and len(trace) == QUICK.requests:
            raise WrongAnswerError("its worker died")
        return Replay(1.0, tuple(Answer("", 1, one.max_tokens or 1, 1.0) for one in trace))

    monkeypatch.setattr("bench.peers.measure.replay", stand_in)
    monkeypatch.setattr("bench.peers.measure.resident_bytes", lambda _: 1)
    tests = {name: rows(name) for name in list(TASKS)[:2]}
    peers = [Peer(name, "", 0, lambda _: {}) for name in (OURS, OURS_INT4, "one peer", "another")]
    failing = "one peer"
    found, bars = asyncio.run(measure(peers, tests, QUICK))
    assert {"server": "one peer", "skipped": "in round 0: its worker died"} in found
    assert [one["id"] for one in bars] == ["peers.mixed.another"]
    failing = OURS
    with pytest.raises(WrongAnswerError):
        asyncio.run(measure(peers, tests, QUICK))
