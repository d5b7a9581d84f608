"""Adam on 16-bit weights: moments in float32, and no float32 copy of the weights that would collect small updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HalfAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015) without weight decay: w ← round(w − lr · m̂ / (√v̂ + ε)) in the weights' own type.

    An update below half the distance to the next number is lost: in bfloat16 below |w| / 512 to |w| / 256. That is what
    leaves most weights of a reinforcement-learning run untouched (arXiv 2505.11711).

    Args:
        parameters: bfloat16 or float16, with gradients of the same type.
        lr: learning rate; a group's `lr` may be changed between steps.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the gradient is computed once"
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    zeros = torch.zeros_like(parameter, dtype=torch.float32)
                    state.update(step=torch.tensor(0.0), exp_avg=zeros, exp_avg_sq=zeros.clone())
                state["step"] += 1
                count = float(state["step"])
                gradient = parameter.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                scale = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
                update = state["exp_avg"] / (1 - first**count) / scale
                parameter.copy_(parameter.float().sub_(update, alpha=group["lr"]))
