"""The fine-tune as a teacher: it answers the exemplars, and what it thought at every token is kept. No labels."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from store.errors import CheckpointError
from store.samples import Sample, additive, pack

Item = TypeVar("Item")

MAX_NEW_TOKENS = 32
_MAX_PROMPT_TOKENS = 512
_BATCH = 48
"""Prompts that are answered together."""
_LESSON = 8
"""Samples of a lesson."""
_AGREEMENT = 0.02
"""Nats that log-probabilities of a packed and a padded row may differ by."""


@dataclass(frozen=True)
class Lesson:
    """Prompts and the fine-tune's answers to them, packed into one row or, for models that cannot, padded.

    Attributes:
        tokens, positions: `[rows, T]` int64.
        attention: `[rows, T]` int64, 0 on padding; of a packed row `[1, 1, T, T]` bool, what may be seen.
        rows, columns: `[N]` int64, where the answers' tokens are predicted, the end of the turn included.
        owners: `[N]` int64, which of the lesson's samples each of them belongs to, counted from 0.
        teacher: `[N, vocabulary]` float32, the fine-tune's log-probabilities there.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    attention: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    owners: torch.Tensor
    teacher: torch.Tensor

    def log_probs(self, model: Any) -> torch.Tensor:
        """The model's log-probabilities where the teacher's are; gradients flow through them."""
        return _log_probs(model, self.tokens, self.positions, self.attention, self.rows, self.columns)

    def kl(self, model: Any) -> torch.Tensor:
        """KL(fine-tune ‖ model) in nats, summed over the answers' tokens; a scalar that gradients flow through."""
        return F.kl_div(self.log_probs(model), self.teacher, log_target=True, reduction="sum")


def load_model(folder: Path, what: str = "the fine-tune", remedy: str = "") -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer): in bfloat16 on what multiplies it natively, else in float32.

    On processors with AVX-512 BF16 a step takes less than half the time, and rounding moves the fine-tune by 1e-5 nats.

    Args:
        what: what the folder holds, and `remedy`, how to do without running it: for the message, since the folder may
            be a copy that nobody has named.

    Raises:
        CheckpointError: the folder cannot be loaded or run as a causal language model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    dtype = torch.bfloat16 if native else torch.float32
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        message = f"{what} cannot be loaded as a causal language model: {error}"
        raise CheckpointError(f"{message}; {remedy}" if remedy else message) from error
    return model.to(device).eval(), tokenizer


@torch.no_grad()  # not inference_mode: a student's gradients go through what is kept here
def listen(model: Any, tokenizer: Any, exemplars: Sequence[str]) -> list[Lesson]:
    """Let the fine-tune answer greedily, and keep its distribution over every token of its answers."""
    stops = _stop_tokens(model, tokenizer)
    prompts = [_prompt_tokens(tokenizer, exemplar) for exemplar in exemplars]
    prompts.sort(key=len)  # little padding
    samples = [Sample(row, answer) for row, answer in answered(model, prompts, stops, MAX_NEW_TOKENS)]
    random.Random(0).shuffle(samples)
    longest = sorted(samples, key=lambda sample: len(sample.prompt) + len(sample.answer))[-2:]
    layout = _packed if not samples or _can_pack(model, longest) else _padded
    lessons = []
    for start in range(0, len(samples), _LESSON):
        chosen = samples[start : start + _LESSON]
        owners = torch.tensor([owner for owner, sample in enumerate(chosen) for _ in sample.answer])
        tokens, positions, attention, rows, columns, owners = (
            part.to(model.device) for part in (*layout(chosen), owners)
        )
        teacher = _log_probs(model, tokens, positions, attention, rows, columns)
        lessons.append(Lesson(tokens, positions, attention, rows, columns, owners, teacher))
    return lessons


@torch.no_grad()
def answered(
    model: Any, prompts: Sequence[tuple[int, ...]], stops: Sequence[int], most: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each prompt with the model's greedy answer of at most `most` tokens, the end of the turn included."""
    # The model's own defaults may sample or penalise repetition.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
    )
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        width = max(len(row) for row in batch)
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in batch], device=model.device)
        made = model.generate(input_ids=padded, attention_mask=attention)[:, width:]
        stopped = torch.isin(made, torch.tensor(list(stops), device=model.device, dtype=made.dtype))
        lengths = ((stopped.cumsum(1) - stopped.long()) == 0).sum(1).tolist()
        for row, answer, length in zip(batch, made.tolist(), lengths, strict=True):
            yield row, tuple(answer[:length])


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], most: int) -> list[str]:
    """Greedy answers of at most `most` tokens, as text without special tokens, in the order of the prompts."""
    encoded = [_prompt_tokens(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    found = answered(model, [encoded[row] for row in order], _stop_tokens(model, tokenizer), most)
    texts = [""] * len(encoded)
    for row, (_, answer) in zip(order, found, strict=True):
        texts[row] = tokenizer.decode(answer, skip_special_tokens=True)
    return texts


@torch.no_grad()
def mean_kl(model: Any, lessons: Sequence[Lesson]) -> float:
    """KL(fine-tune ‖ model) in nats per answer token."""
    return sum(float(lesson.kl(model)) for lesson in lessons) / sum(len(lesson.teacher) for lesson in lessons)


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of them, evenly spaced."""
    count = min(len(items), most)
    return [items[row * len(items) // count] for row in range(count)]


def _prompt_tokens(tokenizer: Any, exemplar: str) -> tuple[int, ...]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": exemplar}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        tokens = tokenizer(exemplar)["input_ids"]
    return tuple(tokens)[-_MAX_PROMPT_TOKENS:] or (tokenizer.eos_token_id or 0,)


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    stops = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*stops, tokenizer.eos_token_id] if token is not None})


def _packed(samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Tokens, positions, attention, rows and columns of a `Lesson`."""
    row = pack(samples)
    return [row.input_ids, row.position_ids, row.visible, torch.zeros_like(row.sources), row.sources]


def _padded(samples: Sequence[Sample]) -> list[torch.Tensor]:
    """The same with a row per sample, padded on the left."""
    whole = [(*sample.prompt, *sample.answer[:-1]) for sample in samples]
    width = max(len(tokens) for tokens in whole)
    attention = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in whole])
    rows = [row for row, sample in enumerate(samples) for _ in sample.answer]
    columns = [column for sample in samples for column in range(width - len(sample.answer), width)]
    return [
        torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in whole]),
        (attention.cumsum(1) - 1).clamp(min=0),  # learned positions must not count the padding
        attention,
        torch.tensor(rows),
        torch.tensor(columns),
    ]


def _can_pack(model: Any, samples: Sequence[Sample]) -> bool:
    """Whether a packed row says the same as samples that cannot see each other: not all models obey such a mask, and
    those with a sliding window do not where samples are longer than that."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    both = [_log_probs(model, *(part.to(model.device) for part in layout(samples))) for layout in (_packed, _padded)]
    return float((both[0] - both[1]).abs().max()) < _AGREEMENT


def _log_probs(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    attention: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> torch.Tensor:
    """`[N, vocabulary]` float32; logits are computed only where some row needs them, where the model can."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False}
    wanted, at = torch.unique(columns, return_inverse=True)
    if "logits_to_keep" in accepted:
        options["logits_to_keep"], columns = wanted, at
    if "position_ids" in accepted:
        options["position_ids"] = positions
    if attention.dtype == torch.bool:
        attention = additive(attention, model.dtype)
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=attention, **options).logits
    return logits[rows, columns].float().log_softmax(-1)
