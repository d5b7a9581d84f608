"""Score a model on a task: `python -m examples.evaluate --model FOLDER --task NAME [-n 100] [--fair]`.

Strict (default): exact match, the bare prompt, room for the longest gold answer and 4 tokens more. A base model
answers in sentences and scores near zero for the format alone; so `--fair` adds the format to the prompt, gives
24 tokens of room and looks for the answer anywhere in the output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.build import load_rows
from examples.finetune import load_base
from examples.packing import prompt_ids
from examples.tasks import TASKS, Row, Task

Metric = Callable[[str, str], bool]
SPARE_TOKENS = 4
FAIR_TOKENS = 24


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16) -> list[str]:
    """Greedy answers, in the order of the prompts, up to `max_new_tokens` tokens or EOS."""
    found = [""] * len(prompts)
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # like lengths together: little padding
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in chosen)
        # Left padding: the last column is every row's last prompt token.
        ids = [[tokenizer.eos_token_id] * (width - len(encoded[i])) + encoded[i] for i in chosen]
        seen = [[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(seen, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    metric: Metric,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
) -> float:
    """Share of rows (0 to 1) whose greedy answer `metric(answer, gold)` accepts; room as in the strict score
    unless `max_new_tokens` says otherwise."""
    if max_new_tokens is None:
        lengths = [len(tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in rows]
        max_new_tokens = max(lengths) + SPARE_TOKENS
    model.eval()
    found = answers(model, tokenizer, [row["prompt"] for row in rows], max_new_tokens, batch_size)
    return sum(metric(text, row["answer"]) for text, row in zip(found, rows, strict=True)) / len(rows)


def evaluate_fair(model: Any, tokenizer: Any, rows: Sequence[Row], task: Task, batch_size: int = 16) -> float:
    """The loose score of `task`, for a model that was not tuned to its format."""
    hinted = [Row(prompt=task.fair_prompt(row["prompt"]), answer=row["answer"]) for row in rows]
    return evaluate(model, tokenizer, hinted, task.fair_score, batch_size, FAIR_TOKENS)


def main() -> None:
    """Command line: prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m examples.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder: the base or a fine-tune")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("-n", type=int, default=100, help="first N test rows (default 100, at most 200)")
    parser.add_argument("--fair", action="store_true", help="format hint and loose match")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    task = TASKS[args.task]
    rows = load_rows(task, "test")[: args.n]
    model, tokenizer = load_base(args.model, torch.device(args.device))
    if args.fair:
        accuracy = evaluate_fair(model, tokenizer, rows, task, args.batch_size)
    else:
        accuracy = evaluate(model, tokenizer, rows, task.score, args.batch_size)
    print(json.dumps({"task": task.name, "n": len(rows), "fair": args.fair, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
