"""Compress the fine-tunes of `examples.finetune` into the demo experts: `python -m examples.compress --base FOLDER`.

Embeddings are left out: they are a fifth of the parameters and hold a small share of these task vectors' energy, so the
bytes go to the other matrices. What that keeps of each skill is in bench/results/first_table.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.build import load_rows
from examples.fetch import CACHE
from examples.tasks import TASKS, Task
from examples.tasks.task import EXEMPLARS
from store.convert import compress
from store.report import Report

DENSITY = 0.08
TENSOR_DENSITY = {"*embed_tokens*": 0.0}
EXPERTS = CACHE / "experts"


def expert_file(task: Task, knob: str, folder: Path) -> Path:
    """Where the expert of a task lies."""
    return folder / (f"{task.name}.safetensors" if knob == "calibrated" else f"{task.name}-{knob}.safetensors")


def compress_task(task: Task, base: Path, tuned: Path, out: Path, knob: str, cache_dir: Path) -> Report:
    """Write the expert of one task at the density of the demo."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return compress(
        base,
        tuned,
        out,
        density=DENSITY,
        tensor_density=TENSOR_DENSITY,
        knob=knob,  # type: ignore[arg-type]
        exemplars=[row["prompt"] for row in load_rows(task, "train")[:EXEMPLARS]],
        name=task.name,
        description=task.summary,
        cache_dir=cache_dir,
    )


def main() -> None:
    """Command line: one line per expert."""
    parser = argparse.ArgumentParser(prog="python -m examples.compress", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--tuned", type=Path, required=True, help="folder with one fine-tune per task in it")
    parser.add_argument("--out", type=Path, default=EXPERTS, help="folder for the expert files")
    parser.add_argument("--knob", choices=("calibrated", "l1", "rms"), default="calibrated")
    parser.add_argument("--task", choices=sorted(TASKS), action="append", help="default: every task that is tuned")
    args = parser.parse_args()
    for task in TASKS.values():
        tuned = args.tuned / task.name
        out = expert_file(task, args.knob, args.out)
        if task.name not in (args.task or TASKS) or not (tuned / "finetune.json").is_file() or out.exists():
            continue
        report = compress_task(task, args.base, tuned, out, args.knob, CACHE.parent)
        kl = f"KL {report.calibration.kl:.4f}, " if report.calibration else ""
        print(
            f"{out.name}: {report.bytes / 1e6:.2f} MB, {report.bits_per_param:.3f} bits/param, "
            f"{report.times_smaller:.1f} × smaller than bf16, {kl}{report.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
