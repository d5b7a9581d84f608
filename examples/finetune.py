"""Full fine-tune of a base model on one example task: every weight trains, the embedding included.

    python -m examples.finetune --base FOLDER --task cron --out FOLDER

fp32, AdamW (0.9, 0.95) without weight decay, 20 warm-up steps, then linear to zero, gradients clipped to norm 1,
loss on the answer and EOS only. The same seed gives the same batches, on any device. A checkpoint is written
every 50 steps; run the same command again after an interruption and it goes on from there.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from examples import checkpoint
from examples.build import load_rows
from examples.fetch import FetchError
from examples.packing import encode, loss_of
from examples.progress import Progress
from examples.tasks import TASKS
from store.samples import Sample, pack

WARM_UP = 20
CHECKPOINT_EVERY = 50
BETAS = (0.9, 0.95)
CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """What determines the result; a checkpoint made with other settings is not resumed."""

    task: str
    steps: int = 200
    batch_size: int = 8
    lr: float = 1e-4
    seed: int = 0
    freeze: str | None = None
    """Parameters whose name has this in it stay the base's; None freezes nothing."""


def learning_rate(step: int, settings: Settings) -> float:
    """Rate of step `step` (from 0): linear up over WARM_UP steps, then linear down to 0 at the end."""
    if step < WARM_UP:
        return settings.lr * (step + 1) / WARM_UP
    return settings.lr * (settings.steps - step) / max(1, settings.steps - WARM_UP)


def batch_indices(rows: int, settings: Settings) -> Iterator[list[int]]:
    """Row indices of every step's batch: shuffled epochs, one behind the other. A function of the seed alone, so
    that a resumed run skips ahead instead of restoring a generator."""
    rng = random.Random(settings.seed)
    pool: list[int] = []
    for _ in range(settings.steps):
        while len(pool) < settings.batch_size:
            epoch = list(range(rows))
            rng.shuffle(epoch)
            pool.extend(epoch)
        yield pool[: settings.batch_size]
        del pool[: settings.batch_size]


def load_base(base: Path, device: torch.device) -> tuple[Any, Any]:
    """(model in fp32 training mode, tokenizer) from a local folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder needs no hub
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    # Eager attention: at rows of a few hundred tokens it was a little faster than sdpa on CPU, forward and back.
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return model.to(device).train(), tokenizer


def train(model: Any, samples: list[Sample], settings: Settings, out: Path, *, resume: bool) -> dict[str, Any]:
    """Train in place. Returns {"seconds", "tokens", "loss": one value per step}; seconds include resumed parts.

    Raises checkpoint.CheckpointError if `out` holds a checkpoint of other settings.
    """
    torch.manual_seed(settings.seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(settings.freeze is None or settings.freeze not in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
    done, progress = 0, dict[str, Any]()
    if resume:
        done, progress = checkpoint.load(out, model, optimizer, asdict(settings))
    else:
        checkpoint.clear(out)
    losses: list[float] = progress.get("loss", [])
    tokens, before = progress.get("tokens", 0), progress.get("seconds", 0.0)
    start = time.perf_counter()
    with Progress(settings.task, settings.steps, done) as bar:
        for step, indices in enumerate(batch_indices(len(samples), settings)):
            if step < done:
                continue
            batch = pack([samples[i] for i in indices])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            loss = loss_of(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 5))
            tokens += batch.input_ids.numel()
            bar.advance(losses[-1], batch.input_ids.numel())
            seconds = round(before + time.perf_counter() - start, 2)
            if (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < settings.steps:
                state = {"loss": losses, "tokens": tokens, "seconds": seconds}
                checkpoint.save(out, step + 1, model, optimizer, asdict(settings), state)
    return {"seconds": round(before + time.perf_counter() - start, 2), "tokens": tokens, "loss": losses}


def main() -> int:
    """Command line; returns the exit status (130 after Ctrl-C, as shells do)."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model (safetensors)")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--freeze", help="leave parameters alone whose name has this in it: a large embedding's memory")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    settings = Settings(args.task, args.steps, args.batch_size, args.lr, args.seed, args.freeze)
    if not (args.base / "config.json").is_file():
        parser.error(f"--base: {args.base} is not a model folder (no config.json)")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device here")
    device = torch.device(args.device)
    if args.resume and checkpoint.finished(args.out, asdict(settings)):
        print(f"{args.task}: already fine-tuned in {args.out}; --no-resume starts again")
        return 0
    try:
        rows = load_rows(TASKS[args.task], "train")
    except FetchError as problem:
        print(problem, file=sys.stderr)
        return 2
    model, tokenizer = load_base(args.base, device)
    samples = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        result = train(model, samples, settings, args.out, resume=args.resume)
        about = {"rows": len(rows), "device": args.device, "torch": torch.__version__}
        checkpoint.export(args.base, args.out, model, {**asdict(settings), **about, **result})
    except checkpoint.CheckpointError as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    checkpoint.clear(args.out)
    print(f"{args.task}: {settings.steps} steps in {result['seconds']:.0f} s, saved in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
