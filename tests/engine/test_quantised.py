"""A base in eight or four bits: close to the full one, the same whatever runs beside it, and never merged into."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from server.engine.engine import TransformersEngine
from server.engine.kernels import integer_kernels
from server.engine.kernels.integers import GROUP, IntegerKernels
from server.engine.model import BaseModel
from server.engine.options import BaseWeights, Mode
from server.engine.quantised import (
    FEW,
    Eight,
    EightAbreast,
    Four,
    FourAbreast,
    Packed,
    QuantisedLinear,
    Tiled,
    _check,
    format_of,
    quantise,
    tiled,
    untiled,
)
from store.errors import ExpertUnavailableError, InvalidRequestError
from store.fingerprint import manifest_of
from store.mix import BASE_MIX, Mix
from tests.engine.conftest import SETTINGS, Library, collect, running
from tests.tiny import config, tokenizer

CPU = torch.device("cpu")
KINDS = [BaseWeights.INT8, BaseWeights.INT4]


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A base whose layers all fit the formats."""
    folder = tmp_path_factory.mktemp("even")
    shape = config().to_dict() | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    return Library(folder / "base", folder)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def kernels(compiled: Path) -> IntegerKernels:
    return integer_kernels(compiled) or pytest.skip("there is no compiler")


def packed_as(form: type[Packed], weight: torch.Tensor, kernels: IntegerKernels) -> Packed:
    return form(weight, kernels) if form in (EightAbreast, FourAbreast) else form(weight)  # type: ignore[call-arg]


@given(st.integers(0, 1 << 30), st.sampled_from([64, 192]), st.sampled_from([32, 160]), st.integers(1, FEW))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("form", [Eight, EightAbreast, Four, FourAbreast])
def test_both_ways_to_compute_mean_the_same_weight_near_the_given_one(
    kernels: IntegerKernels, form: type[Packed], seed: int, out: int, width: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * 10 ** (4 * torch.rand(out, 1, generator=generator) - 3)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    packed = packed_as(form, weight, kernels)
    wide = packed.widened().float()
    if form in (Eight, EightAbreast):
        step = weight.abs().amax(1, keepdim=True).expand(-1, width) / 127
    else:
        groups = weight.view(out, -1, GROUP)
        step = ((groups.amax(2) - groups.amin(2)) / 15).repeat_interleave(GROUP, 1)
    # Half a step, and what rounding scale, offset and sum to bfloat16 adds.
    assert ((wide - weight).abs() <= 0.5 * step + 0.03 * weight.abs().amax(1, keepdim=True)).all()
    expected = x.float() @ wide.T
    error = (packed.product(x).float() - expected).abs()
    assert (error <= 0.01 * (x.float().abs() @ wide.abs().T) + 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_fits_is_quantised_and_a_tied_weight_stays_for_its_other_user(
    kind: BaseWeights, compiled: Path
) -> None:
    torch.manual_seed(0)  # of the worst of thousands of results, one draw in a dozen exceeds what is allowed
    head = nn.Linear(64, 256, bias=False)
    table = nn.Embedding(256, 64)
    head.weight = table.weight
    odd, alone = nn.Linear(50, 64), nn.Linear(64, 128)
    network = nn.ModuleList([table, head, odd, alone]).requires_grad_(False)
    before = table.weight.clone()
    x = torch.randn(40, 64)
    expected = alone(x)
    quantise(network, kind, CPU, compiled)
    assert [type(module) for module in network] == [nn.Embedding, QuantisedLinear, nn.Linear, QuantisedLinear]
    assert torch.equal(table.weight, before)
    assert alone.weight.untyped_storage().nbytes() == alone.weight.dtype.itemsize, "no memory of its own"
    for rows in (1, FEW, FEW + 1, 40):
        assert torch.allclose(alone(x[:rows]), expected[:rows], atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantised_keeps_none_of_the_rest_in_memory(even: Library, kind: BaseWeights) -> None:
    model = BaseModel(even.base, dtype=torch.bfloat16, device=CPU, feature_layer=1, cache_dir=None, weights=kind)
    assert any(isinstance(module, QuantisedLinear) for module in model.network.modules())
    for parameter in model.network.parameters():
        assert parameter.untyped_storage().nbytes() <= parameter.nbytes


def test_it_needs_mixed_mode(even: Library) -> None:
    for mode in (Mode.AUTO, Mode.MERGED):
        with pytest.raises(InvalidRequestError, match="mode=mixed") as refused:
            TransformersEngine(
                even.base,
                name="tiny",
                settings=replace(SETTINGS, base_weights=BaseWeights.INT4, mode=mode),
                read_expert=even.read,
            )
        assert refused.value.param == "mode"


@pytest.mark.parametrize("kind", KINDS)
def test_experts_stay_full_precision_beside_a_quantised_base(even: Library, kind: BaseWeights) -> None:
    """Answers are those of the merged model whose base weights are the quantised ones; the fingerprint is not."""
    mix = Mix.of({even.add(1): 1.0, even.add(2): -0.5})
    options = replace(SETTINGS, mode=Mode.MIXED, base_weights=kind)
    prompts = [[1, 2, 3], list(range(60)), [9] * 30]

    async def body() -> tuple[list[list[int]], dict[str, torch.Tensor]]:
        async with running(even, options) as engine:
            assert engine.base.manifest == manifest_of(even.base, None)
            modules = dict(engine._model.network.named_modules())
            wide = {f"{n}.weight": m.packed.widened() for n, m in modules.items() if isinstance(m, QuantisedLinear)}
            together = await asyncio.gather(*(collect(engine, p, m, 8) for p in prompts for m in (mix, BASE_MIX)))
            return [tokens for tokens, _ in together], wide

    answers, wide = asyncio.run(body())
    assert any("q_proj" in name for name in wide)
    base = AutoModelForCausalLM.from_pretrained(even.base, dtype=torch.float32)
    original = dict(base.named_parameters())
    table = original["model.embed_tokens.weight"]
    head = wide.pop("lm_head.weight", table).float() - table  # 260 rows do not fit PyTorch's four bits
    for place, prompt in enumerate(prompts):
        for answer, of in ((answers[2 * place], mix), (answers[2 * place + 1], BASE_MIX)):
            model = even._merge(of)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in wide:
                        parameter.add_(wide[name].float() - original[name])
                model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight + head)
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 :]
            for row, token in zip(logits, answer, strict=False):
                assert row.max() - row[token] < 0.15, "a difference must be a near tie"


def test_what_must_be_merged_is_refused_and_the_rest_goes_on(even: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix.of({even.add(3): 1.0})
    options = replace(SETTINGS, mode=Mode.MIXED, base_weights=BaseWeights.INT8)

    async def body() -> None:
        async with running(even, options) as engine:
            monkeypatch.setattr(engine._worker.executor.mixed, "carries", lambda expert: False)
            with pytest.raises(ExpertUnavailableError, match="base_weights=full"):
                await collect(engine, [1, 2], mix)
            assert len((await collect(engine, [1, 2], BASE_MIX, 5))[0]) <= 5
            assert all(pins == 0 for _, pins, _ in engine._worker.residency.pins().values())

    asyncio.run(body())


@pytest.mark.parametrize("kind", KINDS)
def test_routing_features_come_from_the_quantised_layers(even: Library, kind: BaseWeights) -> None:
    async def features(options: object) -> torch.Tensor:
        async with running(even, options) as engine:  # type: ignore[arg-type]
            return torch.from_numpy(await engine.features(["hello there", "other words"]))

    full = asyncio.run(features(SETTINGS))
    ours = asyncio.run(features(replace(SETTINGS, mode=Mode.MIXED, base_weights=kind)))
    assert 0 < float((ours - full).norm() / full.norm()) < (0.05 if kind is BaseWeights.INT8 else 0.4)


def test_the_integers_are_buffers_which_the_base_s_hash_covers(compiled: Path, even: Library) -> None:
    model = BaseModel(
        even.base,
        dtype=torch.float32,
        device=CPU,
        feature_layer=2,
        cache_dir=compiled,
        weights=BaseWeights.INT4,
    )
    names = {name.rpartition(".")[2] for name, _ in model.network.named_buffers()}
    assert {"nibbles", "scales"} <= names


@given(st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 1 << 30))
@settings(deadline=None, max_examples=25)
def test_tiles_for_a_gpu_hold_every_level_where_the_lane_looks_for_it(tiles: int, groups: int, seed: int) -> None:
    """Said a second time, lane by lane, as the tensor cores' operand is defined; PyTorch names the same shape."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 16, (8 * tiles, 32 * groups), generator=generator, dtype=torch.int32)
    words = tiled(levels)
    assert torch.equal(untiled(words).int(), levels)
    count = words.shape[3]
    nothing = torch.empty(8 * tiles, 16 * groups, dtype=torch.uint8, device="meta")
    assert torch.ops.aten._convert_weight_to_int4pack(nothing, 2 * count).shape == words.shape
    tile, stretch, word = tiles - 1, words.shape[1] - 1, count - 1
    for lane in range(32):
        row, column = 8 * tile + lane // 4, 32 * (stretch * count + word) + 2 * (lane % 4)
        expected = sum(int(levels[row, column + o]) << 4 * i for i, o in enumerate((0, 8, 16, 24, 1, 9, 17, 25)))
        assert int(words[tile, stretch, lane, word]) & 0xFFFFFFFF == expected


@given(st.integers(0, 1 << 30), st.sampled_from([64, 192]), st.sampled_from([32, 160, 256]))
@settings(deadline=None, max_examples=15)
def test_a_gpu_s_four_bits_mean_what_a_cpu_s_mean(seed: int, out: int, width: int) -> None:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(Tiled(weight).widened(), Four(weight).widened())


@given(st.integers(0, 1 << 30), st.integers(1, 3), st.sampled_from([32, 160, 256]))
@settings(deadline=None, max_examples=15)
def test_our_own_formats_mean_what_pytorch_s_mean(kernels: IntegerKernels, seed: int, blocks: int, width: int) -> None:
    weight = torch.randn(64 * blocks, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(FourAbreast(weight, kernels).widened(), Four(weight).widened())
    assert torch.equal(EightAbreast(weight, kernels).widened(), Eight(weight).widened())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler_pytorch_s_products_serve(
    kind: BaseWeights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    layer = nn.Linear(64, 128).requires_grad_(False)
    x = torch.randn(40, 64)
    expected = layer(x)
    quantise(nn.ModuleList([layer]), kind, CPU, tmp_path)
    assert isinstance(layer, QuantisedLinear)
    assert isinstance(layer.packed, Eight if kind is BaseWeights.INT8 else Four)
    for rows in (1, 40):
        assert torch.allclose(layer(x[:rows]), expected[:rows], atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_more_rows_than_are_read_as_integers_come_out_the_same(
    kind: BaseWeights, monkeypatch: pytest.MonkeyPatch, kernels: IntegerKernels, compiled: Path
) -> None:
    layer = nn.Linear(64, 100).requires_grad_(False)
    quantise(nn.ModuleList([layer]), kind, CPU, compiled)
    assert isinstance(layer, QuantisedLinear)
    assert type(layer.packed) is format_of(kind, CPU, kernels)[0]
    x = torch.randn(9, 64)
    read = layer(x)
    monkeypatch.setattr(type(layer.packed), "few", 8)
    assert torch.allclose(layer(x), read, atol=0.05)
    assert not torch.equal(layer(x), read), "another way to compute"


def test_the_device_chooses_the_format_and_what_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequestError, match="CPUs and NVIDIA GPUs"):
        quantise(nn.Linear(64, 64), BaseWeights.INT4, torch.device("mps"))
    with pytest.raises(InvalidRequestError, match="no such products"):
        _check(Tiled, CPU)
    asked = []
    monkeypatch.setattr("server.engine.quantised.integer_kernels", lambda cache_dir: None)
    monkeypatch.setattr("server.engine.quantised._check", lambda make, device: asked.append((make, device.type)))
    for device in ("cpu", "cuda"):
        for kind in KINDS:
            quantise(nn.ModuleList(), kind, torch.device(device))
    assert asked == [(Eight, "cpu"), (Four, "cpu"), (Eight, "cuda"), (Tiled, "cuda")]


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_products_are_not_believed_unseen(
    kind: BaseWeights, monkeypatch: pytest.MonkeyPatch, kernels: IntegerKernels
) -> None:
    monkeypatch.setattr("server.engine.quantised.integer_kernels", lambda cache_dir: kernels)
    for name in ("multiply_four", "multiply_eight"):
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, right=right: right(*given) * 1.5)
    with pytest.raises(InvalidRequestError, match="packs such weights"):
        quantise(nn.ModuleList(), kind, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_a_gpu_compute_with_the_numbers_they_hold(kind: BaseWeights) -> None:
    layer = nn.Linear(512, 264, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    quantise(nn.ModuleList([layer]), kind, torch.device("cuda"))
    assert isinstance(layer, QuantisedLinear)
    wide = layer.packed.widened().double()
    for rows in (1, 16, FEW, FEW + 1, 100):
        x = torch.randn(rows, 512, device="cuda").bfloat16()
        plain = x.double() @ wide.T + layer.bias.double()
        assert (layer(x).double() - plain).norm() <= 1e-2 * plain.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2, 4, 6])
def test_tiles_are_pytorch_s_own(groups: int) -> None:
    levels = torch.randint(0, 16, (24, 32 * groups), dtype=torch.int32, device="cuda")
    words = tiled(levels)
    pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
    assert torch.equal(words, torch.ops.aten._convert_weight_to_int4pack(pairs, 2 * words.shape[3]))
