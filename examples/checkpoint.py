"""Checkpoints of a fine-tuning run: weights, optimizer state and progress, without pickle.

A checkpoint is a folder `checkpoint-STEP` inside the output folder, written under another name and renamed when
it is whole, so that an interruption at any instant leaves the previous one in force.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PREFIX = "checkpoint-"
PARTIAL = "partial-"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class CheckpointError(RuntimeError):
    """A checkpoint exists, but belongs to a run with other settings."""


def save(
    out: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Write checkpoint `step`, then drop the older ones. All tensors in the dtype they train in."""
    scratch = out / f"{PARTIAL}{step:06d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}  # a tied tensor appears once
    save_file({name: p.detach().cpu() for name, p in names.items()}, scratch / "weights.safetensors")
    moments = {f"{key}:{name}": optimizer.state[p][key].detach().cpu() for name, p in names.items() for key in MOMENTS}
    save_file(moments, scratch / "optimizer.safetensors")
    state = {"step": step, "settings": dict(settings), "progress": dict(progress)}
    (scratch / "state.json").write_text(json.dumps(state), encoding="utf-8")
    target = out / f"{PREFIX}{step:06d}"
    shutil.rmtree(target, ignore_errors=True)
    os.rename(scratch, target)
    for old in out.glob(f"{PREFIX}*"):
        if old != target:
            shutil.rmtree(old)


def load(
    out: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Restore the newest checkpoint in place; returns (steps done, progress), or (0, {}) if there is none.

    Raises CheckpointError if it was made with other settings.
    """
    found = sorted(out.glob(f"{PREFIX}*"))
    if not found:
        return 0, {}
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    if state["settings"] != dict(settings):
        raise CheckpointError(f"{found[-1]} was made with other settings: {state['settings']}; use --no-resume")
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in load_file(found[-1] / "weights.safetensors").items():
            names[name].copy_(tensor)
    with safe_open(found[-1] / "optimizer.safetensors", framework="pt") as moments:
        for name, parameter in names.items():
            restored = {key: moments.get_tensor(f"{key}:{name}") for key in MOMENTS}
            optimizer.state[parameter] = {
                key: value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
                for key, value in restored.items()
            }
    return int(state["step"]), dict(state["progress"])


def clear(out: Path) -> None:
    """Remove every checkpoint in `out`, whole or partial."""
    for folder in (*out.glob(f"{PREFIX}*"), *out.glob(f"{PARTIAL}*")):
        shutil.rmtree(folder, ignore_errors=True)


def finished(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `out` already holds the fine-tuned model of a run with these settings."""
    if not (out / "finetune.json").is_file():
        return False
    report = json.loads((out / "finetune.json").read_text(encoding="utf-8"))
    return all(report.get(key) == value for key, value in settings.items())


def export(base: Path, out: Path, model: torch.nn.Module, report: Mapping[str, Any]) -> None:
    """Write the fine-tuned model as `write_model` does, in fp32, and `finetune.json`."""
    write_model(base, out, model, torch.float32)
    # Last, so that its presence says that the folder is whole.
    (out / "finetune.json.tmp").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(out / "finetune.json.tmp", out / "finetune.json")


def write_model(base: Path, out: Path, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Write a folder that transformers loads: the base's configuration and tokenizer files, and `model.safetensors`
    in `dtype` (the base's tensor names, tied tensors once)."""
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's older name
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: p.detach().to(dtype).cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")
