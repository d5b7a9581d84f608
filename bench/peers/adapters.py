"""LoRA adapters of the size that a user would train, out of our full fine-tunes, since the peers take nothing else.

An adapter is the truncated singular value decomposition of (fine-tuned − base) of every linear layer of the decoder:
the best that any adapter of its rank could be in the Frobenius norm (Eckart and Young, 1936), not what training one
would give. Embeddings and norms, which an adapter leaves alone, stay the base's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
SPARE = 8
"""Columns that the randomised decomposition takes beyond the rank, for its accuracy (Halko et al., 2011)."""


def factors(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and B `[out, rank]`, float32, whose product B A is nearest to `delta` `[out, in]`."""
    torch.manual_seed(0)  # svd_lowrank draws its start from the global generator
    left, values, right = torch.svd_lowrank(delta.float(), q=min(rank + SPARE, *delta.shape), niter=4)
    root = values[:rank].sqrt()
    down, up = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
    down[: len(root)] = (right[:, :rank] * root).T
    up[:, : len(root)] = left[:, :rank] * root
    return down, up


def write_adapter(base: Path, tuned: Path, folder: Path, rank: int) -> Path:
    """Write the adapter of a fine-tune in PEFT's format, unless a newer one is there; returns `folder`."""
    weights, source = folder / WEIGHTS, tuned / "model.safetensors"
    if weights.is_file() and weights.stat().st_mtime > source.stat().st_mtime:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=rank,  # so that the product is applied as it is
        target_modules=list(MODULES),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    ).save_pretrained(str(folder))
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, "pt") as after, safe_open(base / "model.safetensors", "pt") as before:
        for name in after.keys():  # noqa: SIM118 (safe_open is no mapping)
            module = name.removesuffix(".weight")
            if not module.endswith(MODULES):
                continue
            down, up = factors(after.get_tensor(name).float() - before.get_tensor(name).float(), rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
    scratch = folder / "unfinished"
    save_file(tensors, scratch)
    scratch.replace(weights)
    return folder
