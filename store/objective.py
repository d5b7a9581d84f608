"""How far a student's words are from its teacher's: what FlexSwitch can learn by (arXiv 2604.28109, Eq. 9-11).

All take log-probabilities `[N, vocabulary]` of the same N answer tokens, and give a scalar that gradients flow through.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from store.codecs.base import Loss

TEMPERATURE = 2.0


def objective(
    loss: Loss, student: torch.Tensor, teacher: torch.Tensor, temperature: float = TEMPERATURE
) -> torch.Tensor:
    """The loss of that name, per token; only the KL has a temperature."""
    if loss is Loss.KL:
        return softened_kl(student, teacher, temperature)
    return {Loss.MSE: squared_error, Loss.CKA: dissimilarity}[loss](student, teacher)


def softened_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = TEMPERATURE) -> torch.Tensor:
    """T² · KL(teacher ‖ student) in nats per token, both at the temperature T."""
    student, teacher = ((part / temperature).log_softmax(-1) for part in (student, teacher))
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of the logits per token; a token's logits mean the same with any number added, so that counts
    for nothing."""
    difference = student - teacher
    return (difference - difference.mean(-1, keepdim=True)).square().sum(-1).mean()


def dissimilarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 − linear centred kernel alignment of the logits over the tokens, 0 to 1; 0 of a single token."""
    grams = []
    for logits in (student, teacher):
        features = logits - logits.mean(-1, keepdim=True)
        features = features - features.mean(0, keepdim=True)
        grams.append(features @ features.T)
    own, other = grams
    alike: torch.Tensor = (own * other).sum() / (own.square().sum() * other.square().sum()).sqrt().clamp(min=1e-12)
    return 1 - alike
