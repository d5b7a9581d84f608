from __future__ import annotations

import itertools
import mmap

import pytest
import torch
from torch import nn

from server.engine import large_pages
from server.engine.large_pages import PAGE, lay_out, zeros


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 7])
def test_memory_is_zero_and_may_be_written(nbytes: int) -> None:
    memory = zeros(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.dtype is torch.uint8
    assert not memory.any()
    memory.fill_(7)
    assert int(memory.sum()) == 7 * nbytes
    if nbytes >= PAGE:
        assert memory.data_ptr() % PAGE == 0


def test_a_system_without_large_pages_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError("not here")

    monkeypatch.setattr(large_pages.mmap, "mmap", Refusing)
    assert not zeros(PAGE).any()


def test_parameters_keep_their_values_and_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_TOGETHER", 1000)  # several buffers
    module = nn.Sequential(nn.Linear(13, 7), nn.LayerNorm(7), nn.Linear(7, 13, dtype=torch.bfloat16), nn.Linear(1, 1))
    module[3].weight = nn.Parameter(torch.zeros(0, 5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    owners = dict(module.named_parameters())
    lay_out(module.parameters())
    assert dict(module.named_parameters()) == owners
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype is before[name].dtype
        assert value.data_ptr() % 64 == 0
    spans = sorted((value.data_ptr(), value.data_ptr() + value.nbytes) for value in module.state_dict().values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
