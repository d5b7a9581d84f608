"""Norms, gates and rotary embeddings in one kernel each compute what transformers' own code does, or are not used.

In Triton's interpreter; with a GPU the marked test runs the compiled kernels.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from server.engine import fused
from server.engine.sites import Kind, per_row, swapped
from tests import tiny
from tests.engine import test_mixed, test_mixed_graphs
from tests.engine.replaying import as_launch, replayed
from tests.tiny import config
from tests.zygote import ROOT

pytest.importorskip("triton", reason="triton is not installed")
from server.engine import gpu_elementwise
from server.engine.gpu_elementwise import NORM_FORMS, can_norm, can_rotate, gated, rms_norm, rotate

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORMS = (LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm, Olmo2RMSNorm)
FORMS = dict(zip(NORMS, (NORM_FORMS[0], NORM_FORMS[0], NORM_FORMS[1], NORM_FORMS[2]), strict=True))
ARCHITECTURES = ("llama", "qwen2", "gemma3")
some = settings(max_examples=25, deadline=None)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1",
    reason="TRITON_INTERPRET=1 was not set, or there is a GPU",
)


def modeling(architecture: str) -> Any:
    return importlib.import_module(f"transformers.models.{architecture}.modeling_{architecture}")


@pytest.fixture(scope="module")
def forced() -> Iterator[pytest.MonkeyPatch]:
    """What a GPU would have, in the interpreter, of bases of two layers, since it is slow; the modeling code is what it
    was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny._SHAPE, "num_hidden_layers", 2)
        patch.setattr(fused, "_DEVICES", frozenset({"cpu"}))
        for architecture in ARCHITECTURES:
            home = modeling(architecture)
            patch.setattr(home, "apply_rotary_pos_emb", home.apply_rotary_pos_emb)
        yield patch


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def order(x: torch.Tensor) -> list[int]:
    """Strides of the axes along which there is something."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


@interpreted
@some
@given(
    kind=st.sampled_from(NORMS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 6),
    heads=st.integers(1, 3),
    width=st.integers(1, 140),
    form=st.sampled_from(["rows", "heads", "heads first", "every other", "one axis"]),
    own=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    eps=st.sampled_from([1e-6, 1e-5]),
)
def test_norms_of_any_shape(
    kind: Any, dtype: torch.dtype, rows: int, heads: int, width: int, form: str, own: bool, scale: float, eps: float
) -> None:
    x = scale * noise(1, 1, rows, heads, width, dtype=dtype)
    axis = 1
    if form == "heads first":
        x, axis = x.transpose(1, 2), 2
    elif form == "rows":
        x = x[:, :, 0]
    elif form == "every other":
        x = (scale * noise(2, 1, 2 * rows, width + 3, dtype=dtype))[:, ::2, :width]
    elif form == "one axis":
        x, own = scale * noise(2, width, dtype=dtype), False
    module = kind(width, eps=eps).to(dtype)
    weight = noise(3, width, dtype=dtype)
    if own:
        weight = per_row(noise(4, rows + 1, width, dtype=dtype), torch.arange(1, rows + 1), axis, x.ndim)
    with torch.inference_mode(), swapped({"weight": module.weight}, {"weight": weight}):
        expected = module(x)
        assert can_norm(x, weight)
        got = rms_norm(x, weight, eps, FORMS[kind])
    assert order(got) == order(expected)
    steps = 8 if dtype is torch.float32 else 2
    torch.testing.assert_close(got, expected, rtol=steps * torch.finfo(dtype).eps, atol=1e-7)
    if dtype is not torch.float32:
        assert int((got != expected).sum()) <= max(1.0, expected.numel() / 100)


@interpreted
@some
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 5),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    half=st.integers(1, 40),
    form=st.sampled_from(["views", "contiguous", "strided"]),
)
def test_rotations_are_the_same_bits(
    dtype: torch.dtype, rows: int, heads: tuple[int, int], half: int, form: str
) -> None:
    width = 2 * half
    spare = 2 if form == "strided" else 0
    q, k = (noise(i, 1, rows, n, width + spare, dtype=dtype)[..., :width].transpose(1, 2) for i, n in enumerate(heads))
    if form == "contiguous":
        q, k = q.contiguous(), k.contiguous()
    cos, sin = noise(2, 1, rows, width, dtype=dtype), noise(3, 1, rows, width, dtype=dtype)
    assert can_rotate(q, k, cos, sin)
    for got, expected in zip(rotate(q, k, cos, sin), original()(q, k, cos, sin), strict=True):
        assert torch.equal(got, expected)
        assert order(got) == order(expected)


@interpreted
@some
@given(dtype=st.sampled_from(DTYPES), rows=st.integers(0, 3), width=st.integers(1, 800))
def test_gates_of_any_shape(dtype: torch.dtype, rows: int, width: int) -> None:
    gate, up = 5 * noise(0, 1, rows, width, dtype=dtype), noise(1, 1, rows, width, dtype=dtype)
    expected = nn.functional.silu(gate) * up
    got = gated(gate, up)
    steps = 8 if dtype is torch.float32 else 2
    torch.testing.assert_close(got, expected, rtol=steps * torch.finfo(dtype).eps, atol=1e-7)
    if dtype is not torch.float32:
        assert int((got != expected).sum()) <= max(1.0, expected.numel() / 100)


class ClampedMLP(LlamaMLP):
    """Large numbers are cut off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=7.0)
        return self.down_proj(gate * self.up_proj(x))


class ScaledMLP(LlamaMLP):
    """Goes on with what its last projection makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class SwappedMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LlamaMLP, ClampedMLP, ScaledMLP, SwappedMLP])
def test_a_gate_is_fused_if_it_is_a_silu_and_a_product(kind: Any, dtype: torch.dtype) -> None:
    module = kind(config()).to(dtype).requires_grad_(False)
    before = dict(module._modules)
    x = noise(0, 1, 4, 48, dtype=dtype)
    expected = module(x)
    assert fused.fuse_mlp(module, CPU, dtype) == (kind is LlamaMLP)
    assert isinstance(module, fused.Fused) == (kind is LlamaMLP)
    assert list(module._modules.items()) == list(before.items())
    torch.testing.assert_close(module(x), expected)
    assert not isinstance(module, fused.Fused) or not fused.fuse_mlp(module, CPU, dtype), "it is once"


@interpreted
def test_a_gate_of_another_function_keeps_its_code() -> None:
    network = AutoModelForCausalLM.from_config(config("gemma3"))
    mlp = network.model.layers[0].mlp
    assert not fused.fuse_mlp(mlp, CPU, torch.float32)


@interpreted
def test_gradients_go_through_a_fused_gate() -> None:
    module = LlamaMLP(config())
    assert fused.fuse_mlp(module, CPU, torch.float32)
    module(noise(0, 1, 2, 48)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def original() -> Any:
    """Llama's own rotary embedding, whatever stands in its place now."""
    function = modeling("llama").apply_rotary_pos_emb
    return getattr(function, "__wrapped__", function)


class ShiftedRMSNorm(LlamaRMSNorm):
    """Has the name and the parameter, and is another function."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.01


class HalfwayRMSNorm(LlamaRMSNorm):
    """Takes the mean in the input's own precision."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean + self.variance_epsilon))


class AddingRMSNorm(LlamaRMSNorm):
    """Adds eps elsewhere, which shows on small numbers alone."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        root = x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return self.weight * (x / root).to(hidden_states.dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*NORMS, ShiftedRMSNorm, HalfwayRMSNorm, AddingRMSNorm])
def test_a_norm_is_fused_if_it_is_a_known_form(kind: Any, dtype: torch.dtype) -> None:
    """Whatever its weights are when it is loaded."""
    module = kind(48, eps=1e-6).to(dtype).requires_grad_(False)
    before = module.weight.data_ptr()
    is_known = kind in NORMS or (kind is HalfwayRMSNorm and dtype is torch.float32)
    assert fused.fuse_norm(module) == is_known
    assert isinstance(module, fused.Fused) == is_known
    assert isinstance(module, kind)
    assert module.weight.data_ptr() == before
    assert not fused.fuse_norm(module) or not is_known, "it is once"


@interpreted
def test_what_a_fused_norm_does_not_know_is_left_to_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LlamaRMSNorm(48, eps=1e-6)
    assert fused.fuse_norm(module)
    launches: list[object] = []
    monkeypatch.setattr(gpu_elementwise, "norm_into", lambda *given: launches.append(given))
    x = noise(0, 2, 3, 4, 48)
    for other in (x, x[0].mT.contiguous().mT, x[0].double(), x[0].bfloat16(), x[0].requires_grad_()):
        expected = LlamaRMSNorm.forward(module, other)
        assert torch.equal(module(other), expected)
    assert not launches
    module(torch.zeros(3, 48)).sum().backward()
    assert module.weight.grad is not None


def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
    """Pairs of neighbours, as other families of models turn them."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turned = (torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k))
    return tuple(x * cos + y * sin for x, y in zip((q, k), turned, strict=True))


@interpreted
def test_another_rotary_embedding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    home = modeling("llama")
    monkeypatch.setattr(home, "apply_rotary_pos_emb", interleaved)
    assert not fused.fuse_rotary(home, 12, CPU, torch.float32)
    assert home.apply_rotary_pos_emb is interleaved


@interpreted
def test_a_rotary_embedding_is_replaced_once_and_used_for_what_it_was_tried_out_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, plain = modeling("llama"), original()
    monkeypatch.setattr(home, "apply_rotary_pos_emb", plain)
    assert fused.fuse_rotary(home, 12, CPU, torch.float32)
    first = home.apply_rotary_pos_emb
    assert not fused.fuse_rotary(home, 11, CPU, torch.float32), "heads without halves"
    assert fused.fuse_rotary(home, 12, CPU, torch.bfloat16)
    assert home.apply_rotary_pos_emb is first
    assert first.__wrapped__ is plain
    turned: list[object] = []

    def noted(*given: torch.Tensor) -> object:
        turned.append(given)
        return rotate(*given)

    monkeypatch.setattr(gpu_elementwise, "rotate", noted)

    def check(q: torch.Tensor, k: torch.Tensor, *others: Any, **named: Any) -> int:
        turned.clear()
        for got, expected in zip(first(q, k, *others, **named), plain(q, k, *others, **named), strict=True):
            assert torch.equal(got, expected)
        return len(turned)

    q, k, cos, sin = noise(0, 1, 3, 4, 12), noise(1, 1, 2, 4, 12), noise(2, 1, 4, 12), noise(3, 1, 4, 12)
    assert check(q, k, cos, sin) == check(q, k, cos, sin, 1) == check(q, k, cos, sin, unsqueeze_dim=1) == 1
    assert check(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2) == 0
    assert check(q[..., :10], k[..., :10], cos[..., :10], sin[..., :10]) == 0
    assert check(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), cos, sin) == 0
    assert check(q.half(), k.half(), cos.half(), sin.half()) == 0
    assert check(q, k, cos.double(), sin.double()) == 0
    assert check(q.clone().requires_grad_(), k, cos, sin) == 0


def test_on_a_cpu_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    network = AutoModelForCausalLM.from_config(config())
    before = [(type(module), dict(module.__dict__)) for module in network.modules()]
    rotary = modeling("llama").apply_rotary_pos_emb
    with caplog.at_level(logging.INFO, "server.engine.fused"):
        fused.fuse(network, 12, None)
    assert [(type(module), dict(module.__dict__)) for module in network.modules()] == before
    assert modeling("llama").apply_rotary_pos_emb is rotary
    assert not caplog.records


@interpreted
def test_a_kernel_that_does_not_run_changes_nothing(
    forced: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    for name in ("norm_into", "rotate_into", "gate_into"):
        monkeypatch.setattr(gpu_elementwise, name, broken)
    network = AutoModelForCausalLM.from_config(config())
    with caplog.at_level(logging.INFO, "server.engine.fused"):
        fused.fuse(network, 12, None)
    assert not any(isinstance(module, fused.Fused) for module in network.modules())
    assert caplog.text.count("no compiler") == 1


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if type(module).__name__.endswith("RMSNorm")]


class GatedRMSNorm(LlamaRMSNorm):
    """Wants more than its input."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden_states) * gate


@interpreted
def test_a_norm_that_cannot_be_tried_out_keeps_no_other_from_it(
    forced: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.ModuleList([GatedRMSNorm(8), LlamaRMSNorm(8), GatedRMSNorm(8)])
    with caplog.at_level(logging.INFO, "server.engine.fused"):
        fused.fuse(network, 12, None)
    assert [isinstance(module, fused.Fused) for module in network] == [False, True, False]
    assert caplog.text.count("'gate'") == 1


@interpreted
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_of_different_mixes_equal_their_merged_models(
    forced: pytest.MonkeyPatch, architecture: str, tmp_path: Path
) -> None:
    """Experts that move every norm, beside the base and side by side."""
    world = test_mixed.World(tmp_path, architecture)
    assert all(isinstance(module, fused.Fused) for module in norms(world.model.network))
    assert not any(isinstance(module, fused.Fused) for module in norms(world.model._early))
    assert isinstance(modeling(architecture).apply_rotary_pos_emb, fused.FusedRotary)
    assert world.unserved == set()
    vectors = [site for site in world.sites if site.kind is Kind.VECTOR]
    assert {site.module for site in vectors} == set(norms(world.model.network))
    assert all(site.broadcasts for site in vectors)
    world.check(world.prompts()[1:3])


@interpreted
def test_captured_steps_have_the_norms_of_their_mixes(forced: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the first step is run, of the second the operations on tensors alone."""
    from server.engine.kernels.gpu import TritonKernels

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_add", "absorb"):
            patch.setattr(TritonKernels, name, as_launch(getattr(TritonKernels, name)))
        for name in ("norm_into", "rotate_into", "gate_into"):
            patch.setattr(gpu_elementwise, name, as_launch(getattr(gpu_elementwise, name)))
        world = test_mixed_graphs.World(tmp_path, "llama")
        assert all(isinstance(module, fused.Fused) for module in norms(world.model.network))
        assert all(isinstance(layer.mlp, fused.Fused) for layer in world.model.network.get_submodule("model.layers"))
        _, _, two, three, four, five, _ = world.mixes
        graphs = world.graphs(replayed)
        for mixes in ([two, three], [five, four]):
            assert world.check(graphs, mixes)
        assert (graphs.captures, graphs.replays) == (1, 2)


def test_they_compile_for_hopper() -> None:
    """One program for each form of a norm and one for anything else, whatever the rows; nothing spills, and nothing is
    rounded once where PyTorch rounds twice."""
    triton = importlib.import_module("triton")
    if not (Path(triton.__file__ or "").parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("this triton carries no assembler for GPUs")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(ROOT / ".cache" / "triton")
    command = [sys.executable, "-m", "tests.engine.compile_elementwise"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, report in json.loads(done.stdout).items():
        assert report["programs"] == (2 if name.startswith("norm_rows") else 1) < report["launches"], name
        assert report["spilled"] == report["multiply-adds"] == 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_network_on_a_gpu_has_all_of_it(architecture: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config(architecture), dtype=dtype).to(device).eval()
    ids = torch.arange(9, device=device)[None]
    with torch.inference_mode():
        expected = network(ids).logits
        fused.fuse(network, 12, None)
        assert all(isinstance(module, fused.Fused) for module in norms(network))
        gates = [isinstance(layer.mlp, fused.Fused) for layer in network.model.layers]
        assert dtype is torch.float32 or all(gates) == any(gates) == (architecture != "gemma3")
        assert isinstance(modeling(architecture).apply_rotary_pos_emb, fused.FusedRotary)
        torch.testing.assert_close(network(ids).logits, expected, rtol=0.0, atol=50 * torch.finfo(dtype).eps)
