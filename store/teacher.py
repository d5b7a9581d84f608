"""The fine-tune as a teacher: it answers the exemplars, and what it thought at every token is kept. No labels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from store.errors import CheckpointError

MAX_NEW_TOKENS = 32
_MAX_PROMPT_TOKENS = 512
_BATCH = 8


@dataclass(frozen=True)
class Lesson:
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

    def kl(self, model: Any, temperature: float = 1.0) -> torch.Tensor:
        """KL(fine-tune ‖ model) in nats, summed over the answers' tokens; a scalar that gradients flow through.

        At another temperature than 1 both distributions are softened, and the result is multiplied by its square.
        """
        student, teacher = _answer_log_probs(model, self.tokens, self.attention, self.is_answer), self.teacher
        if temperature != 1.0:
            student, teacher = ((part / temperature).log_softmax(-1) for part in (student, teacher))
        return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="sum")


def load_model(folder: Path) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer): float32 on a CPU, bfloat16 on a GPU.

    Raises:
        CheckpointError: the folder cannot be loaded or run as a causal language model.
    """
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


@torch.no_grad()  # not inference_mode: a student's gradients go through what is kept here
def listen(model: Any, tokenizer: Any, exemplars: Sequence[str]) -> list[Lesson]:
    """Let the fine-tune answer greedily, and keep its distribution over every token of its answers."""
    stops = _stop_tokens(model, tokenizer)
    # The model's own defaults may sample or penalise repetition.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    prompts = sorted((_prompt_tokens(tokenizer, exemplar) for exemplar in exemplars), key=len)
    lessons = []
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
        lessons.append(Lesson(tokens, attention, is_answer, _answer_log_probs(model, tokens, attention, is_answer)))
    return lessons


@torch.no_grad()
def mean_kl(model: Any, lessons: Sequence[Lesson]) -> float:
    """KL(fine-tune ‖ model) in nats per answer token."""
    return sum(float(lesson.kl(model)) for lesson in lessons) / sum(len(lesson.teacher) for lesson in lessons)


def spread(exemplars: Sequence[str], most: int) -> list[str]:
    """At most `most` of the exemplars, evenly spaced."""
    count = min(len(exemplars), most)
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


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    declared = model.generation_config.eos_token_id
    stops = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*stops, tokenizer.eos_token_id] if token is not None})


def _answer_log_probs(
    model: Any, tokens: torch.Tensor, attention: torch.Tensor, is_answer: torch.Tensor
) -> torch.Tensor:
    """`[is_answer.sum(), vocabulary]` float32; logits are computed at answer positions only, where the model can."""
    accepted = inspect.signature(model.forward).parameters
    answer = is_answer.shape[1]
    seen = attention[:, :-1]
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = answer
    if "position_ids" in accepted:  # learned positions must not count the padding
        options["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=tokens[:, :-1], attention_mask=seen, **options)
    logits: torch.Tensor = output.logits[:, -answer:]
    return logits[is_answer].float().log_softmax(-1)
