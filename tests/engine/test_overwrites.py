"""Experts that overwrite weights: the engine runs their fine-tune's own bits, and goes back to the base's."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from server.engine.engine import TransformersEngine
from server.engine.kernels import LoadedDelta, Overwrites
from server.engine.kernels.merging import merge_tensor, merge_tensor_reference
from server.engine.merged import digest_of as weights_digest
from server.engine.options import Mode
from store.convert import compress
from store.expert_file import digest_of
from store.mix import Mix
from tests.api.house import BASE, open_house
from tests.engine.conftest import SETTINGS, Library, collect, running
from tests.engine.test_merged import DTYPES, random_delta
from tests.tiny import save_base, tokenizer

pytestmark = pytest.mark.anyio

PROMPT = [72, 101, 108, 108, 111]


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    half=st.sampled_from([torch.bfloat16, torch.float16]),
    weight=st.sampled_from([1.0, 0.5, -1.0, 1.5]),
    beside=st.sampled_from(["nothing", "sparse", "dense", "another"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_merging_equals_the_reference_bit_for_bit(
    shape: list[int], dtype: torch.dtype, half: torch.dtype, weight: float, beside: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pristine = torch.randn(shape, generator=generator).to(dtype)

    def overwrites() -> Overwrites:
        places = torch.nonzero(torch.rand(math.prod(shape), generator=generator) < 0.4).view(-1)
        return Overwrites(tuple(shape), places.int(), torch.randn(len(places), generator=generator).to(half))

    terms: list[tuple[float, LoadedDelta]] = [(weight, overwrites())]
    if beside == "another":
        terms.append((0.5, overwrites()))
    elif beside != "nothing":
        terms.append((1.0, random_delta(tuple(shape), 0.3 if beside == "sparse" else None, seed)))
    out = torch.full_like(pristine, float("nan"))
    merge_tensor(out, pristine, terms)
    assert torch.equal(out, merge_tensor_reference(pristine, terms))
    first = terms[0][1]
    assert isinstance(first, Overwrites)
    if beside == "nothing" and weight == 1.0:
        assert torch.equal(out.view(-1)[first.places.long()], first.values.to(dtype))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Library, str, Path]:
    """A bfloat16 base, the digest of an expert that overwrites it, and the fine-tune's folder."""
    folder = tmp_path_factory.mktemp("trained")
    base, tuned = save_base(folder / "base"), folder / "tuned"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.rand(parameter.shape, generator=generator) < 0.1
            parameter[moved] = (parameter[moved] * 1.5).to(parameter.dtype)
        model.model.norm.weight[3] = -0.0
    model.save_pretrained(tuned)
    tokenizer().save_pretrained(tuned)
    library = Library(base, folder)
    compress(base, tuned, folder / "expert", codec="overwrite", name="rl")
    digest = digest_of(folder / "expert")
    library.files[digest] = folder / "expert"
    return library, digest, tuned


def fine_tune(tuned: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tuned, dtype=getattr(torch, dtype)).eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    answer: list[int] = made[0, len(prompt) :].tolist()
    return answer[: answer.index(256)] if 256 in answer else answer


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_engine_runs_the_fine_tune_itself(trained: tuple[Library, str, Path], mode: Mode, dtype: str) -> None:
    library, digest, tuned = trained
    model = fine_tune(tuned, dtype)
    wanted = weights_digest(dict(model.named_parameters()))
    async with running(library, replace(SETTINGS, mode=mode, dtype=dtype)) as engine:
        merged = engine._worker.executor.merged
        pristine = merged.pristine_fingerprint()
        tokens, _ = await collect(engine, PROMPT, Mix.of({digest: 1.0}))
        assert merged.fingerprint() == wanted
        if dtype == "float32":
            assert tokens == greedy(model, PROMPT, 12)
        await collect(engine, PROMPT, Mix())
        assert merged.fingerprint() == pristine != wanted


async def test_beside_the_base_and_others_it_is_merged_all_the_same(trained: tuple[Library, str, Path]) -> None:
    library, digest, tuned = trained
    other = library.add(5)
    model = fine_tune(tuned, "float32")
    async with running(library, replace(SETTINGS, mode=Mode.MIXED)) as engine:
        mixes = [Mix.of({digest: 1.0}), Mix(), Mix.of({other: 1.0}), Mix.of({digest: 1.0})]
        answers = await asyncio.gather(*(collect(engine, PROMPT, mix) for mix in mixes))
        stats = engine.stats()
    assert [tokens for tokens, _ in answers][::3] == [greedy(model, PROMPT, 12)] * 2
    assert answers[2][0] == library.greedy(mixes[2], PROMPT, 12)
    assert stats.merged_steps > 0
    assert stats.mixed_steps > 0


async def test_a_mix_is_the_float_sum(trained: tuple[Library, str, Path]) -> None:
    """base + ½ (fine-tune − base) + another, in float32."""
    library, digest, tuned = trained
    other = library.add(5)
    model = AutoModelForCausalLM.from_pretrained(library.base, dtype=torch.float32)
    both = dict(fine_tune(tuned, "float32").named_parameters())
    added = dict(library.merged(Mix.of({other: 1.0})).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter + 0.5 * (both[name] - parameter) + (added[name] - parameter))
    async with running(library) as engine:
        tokens, _ = await collect(engine, PROMPT, Mix.of({digest: 0.5, other: 1.0}))
    assert tokens == greedy(model.eval(), PROMPT, 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_over_http(trained: tuple[Library, str, Path], tmp_path: Path, dtype: str) -> None:
    """Uploaded to a server with the real engine: alone exact, in a type that holds bfloat16; mixed or scaled not, and
    both are said."""
    library, digest, tuned = trained
    wanted = weights_digest(dict(fine_tune(tuned, dtype).named_parameters()))
    rounded = fine_tune(tuned, dtype).float().state_dict()
    is_exact = all(
        torch.equal(rounded[name], value) for name, value in fine_tune(tuned, "float32").state_dict().items()
    )
    assert is_exact == (dtype != "float16"), "it has weights that float16 lacks"
    other = library.add(6)
    files = dict(library.files)

    def read(digest: str) -> bytes:
        return files[digest].read_bytes()

    given = replace(SETTINGS, dtype=dtype)
    engine: Any = TransformersEngine(library.base, name=BASE, settings=given, read_expert=read)
    async with open_house(tmp_path, engine=engine, base_folder=library.base) as house:
        for name, which in (("rl", digest), ("plain", other)):
            sent = await house.http.post(
                "/v1/experts", files={"file": ("e", files[which].read_bytes())}, data={"name": name}
            )
            assert sent.status_code == 201, sent.text
            assert sent.json()["exact"] is (name == "rl")
        alone = await house.chat(model="rl", max_tokens=4, temperature=0)
        assert engine._worker.executor.merged.fingerprint() == wanted
        assert alone.headers["x-switchyard-exact"] == str(is_exact).lower()
        assert alone.json()["usage"]["switchyard"]["exact"] is is_exact
        for experts in (
            [{"id": "rl", "weight": 0.5}],
            [{"id": "rl", "weight": 1}, {"id": "plain", "weight": 1}],
        ):
            mixed = await house.chat(experts=experts, max_tokens=4, temperature=0)
            assert mixed.headers["x-switchyard-exact"] == "false"
            assert mixed.json()["usage"]["switchyard"]["exact"] is False
            assert engine._worker.executor.merged.fingerprint() != wanted
        plain = await house.chat(model="plain", max_tokens=4)
        assert "x-switchyard-exact" not in plain.headers
        assert "exact" not in plain.json()["usage"]["switchyard"]
        streamed = await house.chat(model="rl", max_tokens=4, stream=True)
        assert streamed.headers["x-switchyard-exact"] == str(is_exact).lower()
