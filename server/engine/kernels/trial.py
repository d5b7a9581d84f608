"""What a foreign compiler has made is not believed unseen: a small case, compared with plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from server.engine.kernels.packing import pack
from server.engine.kernels.reference import ReferenceKernels
from server.engine.kernels.types import Group, Kernels
from store.deltas import SparseDelta

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def computes_rightly(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether lists and planes, beside weights, multiplied with and merged, come out as the reference has them.

    Raises whatever the kernels do.
    """
    reference, rng, rtol = ReferenceKernels(), np.random.default_rng(0), _TOLERANCE[dtype]
    out, width, rows = 72, 100, 9
    for density in (0.02, 0.5):
        kept = np.flatnonzero(rng.random(out * width) < density).astype(np.int32)
        signs = rng.choice(np.array([-1, 1], np.int8), len(kept))
        delta = pack(SparseDelta((out, width), kept, signs, 0.1), device, kernels.lanes)
        groups = [Group(0, 1, ((1.0, delta),)), Group(2, rows, ((0.5, delta),))]
        x = torch.from_numpy(rng.standard_normal((rows, width), np.float32)).to(device, dtype)
        weight = torch.from_numpy(rng.standard_normal((out, width), np.float32)).to(device, dtype)
        products, expected = (torch.ones(2, rows, out, device=device, dtype=dtype) for _ in range(2))
        merged, plain = (torch.empty_like(weight) for _ in range(2))
        for one, into, onto in ((kernels, products, merged), (reference, expected, plain)):
            one.add_linear(into[0], x, groups)
            one.fused_linear(into[1], x, weight, None, groups)
            one.merge(onto, weight, groups[1].terms)
        if not (torch.allclose(products, expected, rtol=rtol, atol=10 * rtol) and torch.equal(merged, plain)):
            return False
    return True
