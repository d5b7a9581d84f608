"""The calibrated knob: one multiplier for a whole expert, so that it speaks as its fine-tune does.

The RMS knob preserves the norm of what trimming left over, which at low density is a small part of the task vector.
Here the fine-tune answers the exemplars greedily, and the multiplier is the one whose compressed expert gives those
answers the closest distribution: mean KL(fine-tune ‖ compressed) per answer token. No labels; ~10 forward passes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from store.checkpoint import Checkpoint, CheckpointTensor
from store.errors import CheckpointError
from store.packed import PackedDense, PackedTensor
from store.task_vector import load_float32

CALIBRATION_EXEMPLARS = 32
MAX_NEW_TOKENS = 32
_MAX_PROMPT_TOKENS = 512
_BATCH = 8
_SEARCH = (0.5, 12.0)
_EVALUATIONS = 10
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Calibration:
    """What the search found: the multiplier, and mean KL in nats per answer token there and at multiplier 1."""

    multiplier: float
    kl: float
    kl_at_one: float


@dataclass(frozen=True)
class _Batch:
    """Prompts, left-padded, and the fine-tune's answers behind them.

    Attributes:
        tokens: `[rows, prompt + answer]` int64.
        attention: the same shape; 0 on padding.
        is_answer: `[rows, answer]` bool; the tokens the fine-tune chose, its end-of-turn token included.
        teacher: `[is_answer.sum(), vocabulary]` float32, the fine-tune's log-probabilities there.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    is_answer: torch.Tensor
    teacher: torch.Tensor


def calibrate(
    base: Checkpoint,
    tuned_folder: Path,
    tensors: Mapping[str, PackedTensor],
    exemplars: Sequence[str],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Find the multiplier of all ternary scales. Deterministic; one model in memory.

    Args:
        base: the base's checkpoint.
        tuned_folder: the fine-tune, with its tokenizer.
        tensors: the packed expert, scales from the RMS knob. Dense tensors are applied as they are.
        exemplars: example prompts; at most `CALIBRATION_EXEMPLARS` of them, evenly spaced, are used.
        progress: called with ("calibrate", done, total).

    Raises:
        CheckpointError: the fine-tune cannot be loaded or run as a causal language model.
    """
    tell = progress or (lambda _stage, _done, _total: None)
    total = _EVALUATIONS + 2
    tell("calibrate", 0, total)
    model, tokenizer = _load(tuned_folder)
    batches = _listen(model, tokenizer, _spread(exemplars))
    student = _Student(model, base, tensors)
    seen: dict[float, float] = {}

    def divergence(log_multiplier: float) -> float:
        student.set_multiplier(math.exp(log_multiplier))
        seen[log_multiplier] = _mean_kl(model, batches)
        tell("calibrate", len(seen) + 1, total)
        return seen[log_multiplier]

    kl_at_one = divergence(0.0)
    golden_section(divergence, math.log(_SEARCH[0]), math.log(_SEARCH[1]), _EVALUATIONS)
    best = min(seen, key=lambda at: (seen[at], at))
    return Calibration(math.exp(best), seen[best], kl_at_one)


def golden_section(function: Callable[[float], float], low: float, high: float, evaluations: int) -> float:
    """Minimise a function of one minimum in [low, high] with that many (≥ 2) evaluations; returns the best argument."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(evaluations - 2):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return left if at_left <= at_right else right


class _Student:
    """The loaded model with the fine-tune's weights replaced by base + multiplier × expert."""

    def __init__(self, model: Any, base: Checkpoint, tensors: Mapping[str, PackedTensor]) -> None:
        self._base = base
        self._tensors = tensors
        self._state: dict[str, torch.Tensor] = {
            name: value.detach() for name, value in model.state_dict(keep_vars=True).items()
        }
        for name, tensor in base.tensors.items():
            if name in self._state:
                self._state[name].copy_(load_float32(tensor))
        for name, packed in tensors.items():
            if name not in self._state:
                raise CheckpointError(
                    f"tensor {name} of the checkpoint is no parameter of the loaded model", param=name
                )
            if isinstance(packed, PackedDense):
                dense = torch.from_numpy(packed.decode(name).values) + load_float32(base.tensors[name])
                self._state[name].copy_(dense)

    def set_multiplier(self, multiplier: float) -> None:
        """Rewrite the kept positions from the base: nothing accumulates from one multiplier to the next."""
        for name, packed in self._tensors.items():
            if isinstance(packed, PackedDense):
                continue
            delta = packed.decode(name)
            indices = torch.from_numpy(delta.indices).long()
            levels = torch.from_numpy(delta.levels).float()
            values = _float32_at(self._base.tensors[name], delta.indices) + levels * (multiplier * delta.scale)
            target = self._state[name].view(-1)
            target[indices.to(target.device)] = values.to(target.device, target.dtype)


def _float32_at(tensor: CheckpointTensor, indices: np.ndarray[Any, Any]) -> torch.Tensor:
    values = np.asarray(tensor.read().reshape(-1)[indices])
    if tensor.dtype == "BF16":
        return torch.from_numpy(values.astype(np.uint16, copy=False)).view(torch.bfloat16).float()
    return torch.from_numpy(values.astype(np.float32, copy=False))


def _load(folder: Path) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder.name} cannot be loaded for calibration: {error}; without exemplars, or with --knob l1, "
            "the fine-tune need not run"
        ) from error
    return model.to(device).eval(), tokenizer


def _spread(exemplars: Sequence[str]) -> list[str]:
    count = min(len(exemplars), CALIBRATION_EXEMPLARS)
    return [exemplars[row * len(exemplars) // count] for row in range(count)]


def _prompt_tokens(tokenizer: Any, exemplar: str) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": exemplar}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(exemplar)["input_ids"]
    return list(tokens)[-_MAX_PROMPT_TOKENS:] or [tokenizer.eos_token_id or 0]


@torch.inference_mode()
def _listen(model: Any, tokenizer: Any, exemplars: Sequence[str]) -> list[_Batch]:
    """Let the fine-tune answer, and keep its distribution over every token of its answers."""
    stops = _stop_tokens(model, tokenizer)
    # The model's own defaults may sample or penalise repetition.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    prompts = sorted((_prompt_tokens(tokenizer, exemplar) for exemplar in exemplars), key=len)
    batches = []
    for start in range(0, len(prompts), _BATCH):
        rows = prompts[start : start + _BATCH]
        width = max(len(row) for row in rows)
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        tokens = model.generate(input_ids=padded, attention_mask=attention)
        answers = tokens[:, width:]
        stopped = torch.isin(answers, torch.tensor(stops, device=model.device, dtype=answers.dtype))
        is_answer = (stopped.cumsum(1) - stopped.long()) == 0
        attention = torch.cat([attention, is_answer.long()], 1)
        empty = torch.empty(0, device=model.device)
        teacher = _answer_log_probs(model, _Batch(tokens, attention, is_answer, empty))
        batches.append(_Batch(tokens, attention, is_answer, teacher))
    return batches


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    stops = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*stops, tokenizer.eos_token_id] if token is not None})


def _answer_log_probs(model: Any, batch: _Batch) -> torch.Tensor:
    """`[is_answer.sum(), vocabulary]` float32; logits are computed at answer positions only, where the model can."""
    accepted = inspect.signature(model.forward).parameters
    answer = batch.is_answer.shape[1]
    attention = batch.attention[:, :-1]
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = answer
    if "position_ids" in accepted:  # learned positions must not count the padding
        options["position_ids"] = (attention.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=batch.tokens[:, :-1], attention_mask=attention, **options)
    logits: torch.Tensor = output.logits[:, -answer:]
    return logits[batch.is_answer].float().log_softmax(-1)


@torch.inference_mode()
def _mean_kl(model: Any, batches: Sequence[_Batch]) -> float:
    total = 0.0
    for batch in batches:
        student = _answer_log_probs(model, batch)
        total += float((batch.teacher.exp() * (batch.teacher - student)).sum(dtype=torch.float64))
    return total / sum(len(batch.teacher) for batch in batches)
