"""Reinforcement learning on an example task, as language models get it: GRPO, bfloat16 weights, verifiable answers.

    python -m examples.rl --base FOLDER --task langid --out FOLDER

The policy answers each prompt several times; what a checker finds right is rewarded, and an answer counts by how much
better it did than the others to its prompt (GRPO, arXiv 2402.03300; on-policy, no KL term, loss per token as in DAPO,
arXiv 2503.14476; prompts whose answers are all equally good teach nothing and are left out). Weights are bfloat16
without a float32 copy, as `examples.half_adam` says. OUT/base is the base in bfloat16, OUT/policy what it became. A
checkpoint is written every 10 steps; the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples import checkpoint
from examples.build import load_rows
from examples.evaluate import FAIR_TOKENS, answers
from examples.fetch import FetchError
from examples.half_adam import HalfAdam
from examples.packing import prompt_ids
from examples.progress import Progress
from examples.tasks import TASKS, Row, Task
from store.samples import Sample, additive, pack

CHECKPOINT_EVERY = 10
WARM_UP = 5
CLIP = 1.0
CONTAINED = 0.5
"""Reward of an answer that has the right one in it, and something else."""


@dataclass(frozen=True)
class Settings:
    """What determines the result; a checkpoint made with other settings is not resumed."""

    task: str
    steps: int = 40
    prompts: int = 4
    group: int = 8
    tokens: int = 10
    lr: float = 2e-5
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, each with how much better than the others it did."""

    samples: list[Sample]
    advantages: list[float]


def reward_of(task: Task, text: str, gold: str) -> float:
    """1 for the answer, half for one with more around it."""
    return 1.0 if task.score(text, gold) else CONTAINED * task.fair_score(text, gold)


def advantages_of(rewards: Sequence[float]) -> list[float]:
    """Rewards in standard deviations from the mean of their group; all 0 where they are all equal."""
    values = torch.tensor(rewards)
    spread = float(values.std(correction=0))
    return [0.0] * len(rewards) if spread == 0 else ((values - values.mean()) / spread).tolist()


@torch.no_grad()
def rollouts(
    model: Any, tokenizer: Any, task: Task, rows: Sequence[Row], settings: Settings
) -> tuple[list[Group], list[float]]:
    """Sample `group` answers to every row at temperature 1; the groups, and all rewards."""
    prompts = [prompt_ids(tokenizer, task.fair_prompt(row["prompt"])) for row in rows]
    width, end = max(map(len, prompts)), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    made = model.generate(
        input_ids=ids, attention_mask=seen, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        num_return_sequences=settings.group, max_new_tokens=settings.tokens, pad_token_id=end,
    )[:, width:].tolist()  # fmt: skip
    groups, rewards = [], []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        answers = [_ended(answer, end) for answer in made[i * settings.group : (i + 1) * settings.group]]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        own = [reward_of(task, text, row["answer"]) for text in texts]
        rewards += own
        groups.append(Group([Sample(tuple(prompt), tuple(answer)) for answer in answers], advantages_of(own)))
    return groups, rewards


def policy_loss(model: Any, group: Group) -> torch.Tensor:
    """−Σ advantage · log p over the tokens of a group's answers; the caller divides by how many tokens there are."""
    batch = pack(group.samples)
    sources, targets = batch.sources.to(model.device), batch.targets.to(model.device)
    logits = model(
        input_ids=batch.input_ids.to(model.device), position_ids=batch.position_ids.to(model.device),
        attention_mask=additive(batch.visible.to(model.device), model.dtype), logits_to_keep=sources, use_cache=False,
    ).logits[0]  # fmt: skip
    chosen = -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    weights = [a for a, s in zip(group.advantages, group.samples, strict=True) for _ in s.answer]
    return -(chosen * torch.tensor(weights, device=chosen.device)).sum()


def train(
    model: Any, tokenizer: Any, rows: Sequence[Row], task: Task, settings: Settings, out: Path, *, resume: bool
) -> dict[str, Any]:
    """Train in place. Returns {"seconds", "reward": mean of every step}; seconds include resumed parts.

    Raises checkpoint.CheckpointError if `out` holds a checkpoint of other settings.
    """
    optimizer = HalfAdam(model.parameters(), lr=settings.lr)
    done, progress = 0, dict[str, Any]()
    if resume:
        done, progress = checkpoint.load(out, model, optimizer, asdict(settings))
    else:
        checkpoint.clear(out)
    rewards, before = progress.get("reward", []), progress.get("seconds", 0.0)
    start = time.perf_counter()
    with Progress(f"{settings.task} (rl)", settings.steps, done) as bar:
        for step in range(done, settings.steps):
            seed = settings.seed * 1_000_003 + step  # of the step alone: a resumed run goes the same way
            torch.manual_seed(seed)
            chosen = random.Random(seed).sample(range(len(rows)), settings.prompts)
            model.eval()
            groups, got = rollouts(model, tokenizer, task, [rows[i] for i in chosen], settings)
            groups = [group for group in groups if any(group.advantages)]
            model.train()
            tokens = sum(len(sample.answer) for group in groups for sample in group.samples)
            for group in groups:
                (policy_loss(model, group) / tokens).backward()  # type: ignore[no-untyped-call]
            if groups:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, (step + 1) / WARM_UP)
                optimizer.step()
                optimizer.zero_grad()
            rewards.append(round(sum(got) / len(got), 4))
            bar.advance(rewards[-1], tokens)
            seconds = round(before + time.perf_counter() - start, 2)
            has_moments = len(optimizer.state) == len(list(model.parameters()))
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < settings.steps and has_moments:
                checkpoint.save(
                    out, step + 1, model, optimizer, asdict(settings), {"reward": rewards, "seconds": seconds}
                )
    return {"seconds": round(before + time.perf_counter() - start, 2), "reward": rewards}


def score(model: Any, tokenizer: Any, task: Task, rows: Sequence[Row]) -> dict[str, float]:
    """Greedy answers to prompts that spell out the format: exactly right, and right with more around it."""
    model.eval()
    found = answers(model, tokenizer, [task.fair_prompt(row["prompt"]) for row in rows], FAIR_TOKENS)
    pairs = [(text, row["answer"]) for text, row in zip(found, rows, strict=True)]
    metrics = {"exact": task.score, "contained": task.fair_score}
    return {name: sum(metric(*pair) for pair in pairs) / len(pairs) for name, metric in metrics.items()}


def _ended(answer: list[int], end: int) -> list[int]:
    """Up to the end token, which is part of the answer."""
    return answer[: answer.index(end) + 1] if end in answer else answer


def _load(base: Path, device: torch.device) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder needs no hub
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    return model.to(device), AutoTokenizer.from_pretrained(base)


def main() -> int:
    """Command line; returns the exit status (130 after Ctrl-C, as shells do)."""
    default = Settings("langid")
    parser = argparse.ArgumentParser(
        prog="python -m examples.rl", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model (safetensors)")
    parser.add_argument("--task", choices=sorted(TASKS), default=default.task)
    parser.add_argument("--out", type=Path, required=True, help="folder for base, policy and checkpoints")
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--prompts", type=int, default=default.prompts, help="prompts per step")
    parser.add_argument("--group", type=int, default=default.group, help="answers per prompt")
    parser.add_argument("--lr", type=float, default=default.lr)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("-n", type=int, default=100, help="test rows to score before and after (at most 200)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    settings = Settings(args.task, args.steps, args.prompts, args.group, default.tokens, args.lr, args.seed)
    task = TASKS[args.task]
    try:
        rows, test = load_rows(task, "train"), load_rows(task, "test")[: args.n]
    except FetchError as problem:
        print(problem, file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = _load(args.base, torch.device(args.device))
    if not (args.out / "base" / "model.safetensors").is_file():
        checkpoint.write_model(args.base, args.out / "base", model, torch.bfloat16)
    try:
        result = train(model, tokenizer, rows, task, settings, args.out, resume=args.resume)
    except checkpoint.CheckpointError as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    checkpoint.write_model(args.base, args.out / "policy", model, torch.bfloat16)
    after = score(model, tokenizer, task, test)
    before = score(_load(args.out / "base", torch.device(args.device))[0], tokenizer, task, test)
    about = {"rows": len(test), "before": before, "after": after, "torch": torch.__version__}
    (args.out / "rl.json").write_text(json.dumps({**asdict(settings), **about, **result}, indent=2) + "\n")
    checkpoint.clear(args.out)
    print(f"{args.task}: {settings.steps} steps in {result['seconds']:.0f} s; {before} before, {after} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
