"""What a CUDA graph does, on a CPU: every operation on tensors is noted once, and done again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from server.engine.graphs import Step


class _Recorder(TorchDispatchMode):
    at_work: ClassVar[list[_Recorder]] = []

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __enter__(self) -> Self:
        self.at_work.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.at_work.pop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value went back to the host, which no graph can do")
        made = func(*args, **(kwargs or {}))
        # Parameters may be pointed elsewhere later: what is noted is the memory.
        self.calls.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, made))))
        return made


def replayed(step: Step) -> Step:
    """A `Capture`: runs the step once; from then on its operations on tensors alone, whatever the host knows then."""
    recorder = _Recorder()
    with recorder:
        step()

    @torch.inference_mode()
    def replay() -> None:
        for func, args, kwargs, before in recorder.calls:
            for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    return replay


def as_launch(function: Callable[..., None]) -> Callable[..., None]:
    """A function that counts as one operation, whatever it does with the tensors it is given: a kernel's launch."""

    def launch(*args: Any) -> None:
        if not _Recorder.at_work:
            function(*args)
            return
        with _disable_current_modes():
            function(*args)
        _Recorder.at_work[-1].calls.append((function, args, {}, None))

    return launch
