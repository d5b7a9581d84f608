"""What an RL run changed, and what keeping all of it takes: `python -m bench.rl --run FOLDER` (of `examples.rl`).

The expert is compressed by `overwrite`, put on the base again and compared bit by bit; sizes of the other ways to keep
everything stand beside it. Timings are not measured.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from bench.report import bar, show, write
from store.apply import apply_expert
from store.checkpoint import open_checkpoint
from store.codecs.overwrite import steps_between
from store.convert import compress
from store.expert_file import read_header
from store.report import Report


def same_bits(merged: dict[str, torch.Tensor], tuned: Path) -> bool:
    """Whether every weight is the fine-tune's, zeros' signs included."""
    wanted = load_file(tuned / "model.safetensors")
    return merged.keys() == wanted.keys() and all(
        torch.equal(merged[name].view(torch.int16), wanted[name].view(torch.int16)) for name in wanted
    )


def small_steps(base: Path, tuned: Path) -> float:
    """The share of the changed weights that moved to a neighbouring number."""
    ours, theirs = open_checkpoint(base), open_checkpoint(tuned)
    near = total = 0
    for name, tensor in ours.tensors.items():
        steps = steps_between(name, tensor, theirs.tensors[name])[2]
        near, total = near + int(np.count_nonzero(np.abs(steps.astype(np.int32)) == 1)), total + len(steps)
    return near / max(1, total)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rl", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder that examples.rl wrote")
    args = parser.parse_args()
    base, policy = args.run / "base", args.run / "policy"
    run = json.loads((args.run / "rl.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "expert"
        report = compress(base, policy, out, codec="overwrite", name=run["task"])
        exact = same_bits(apply_expert(out, base), policy)
        raw = compress(base, policy, Path(folder) / "raw", codec="raw")
        features = list(read_header(out).required_features)
    row = measured(run, report, raw, small_steps(base, policy), exact) | {"features": ", ".join(features)}
    bars = [
        bar("rl.exact", "an RL run's expert is its checkpoint bit by bit", float(exact), ">=", 1),
        bar("rl.smaller", "its file, times smaller than the bf16 checkpoint", report.times_smaller, ">=", 3.8),
    ]
    show([row], bars)
    write("rl", "python -m bench.rl --run .cache/rl/langid", [row | {"reward": run["reward"]}], bars)


def measured(run: dict[str, object], report: Report, raw: Report, near: float, exact: bool) -> dict[str, object]:
    """The figures of one run."""
    changed = 0.0 if report.probe is None else report.probe.changed
    return {
        **{key: run[key] for key in ("task", "steps", "prompts", "group", "lr", "seconds", "before", "after", "rows")},
        "weights changed": changed,
        "of them by one step": near,
        "bytes": report.bytes,
        "bits/param": report.bits_per_param,
        "times smaller than bf16": report.times_smaller,
        "raw bytes (not exact)": raw.bytes,
        "bits/changed weight": report.bits_per_param / changed if changed else 0.0,
        "exact": exact,
    }


if __name__ == "__main__":
    main()
