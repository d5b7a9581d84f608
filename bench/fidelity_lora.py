"""A LoRA trained on a task from its labelled rows, as large as an expert: what one would do without a fine-tune."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from examples.build import load_rows
from examples.finetune import load_base
from examples.packing import encode, loss_of
from examples.tasks import Task
from store.samples import pack

STEPS = 150
BATCH = 8
RATE = 2e-3
"""Peak; linear to zero. Small ranks want a high one."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_lora(base: Path, task: Task, rank: int, out: Path, steps: int = STEPS) -> None:
    """Train an adapter of every linear layer, round it to bfloat16 and save it as PEFT does. Deterministic."""
    torch.manual_seed(0)
    model, tokenizer = load_base(base, torch.device("cpu"))
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    samples = [encode(tokenizer, row["prompt"], row["answer"]) for row in load_rows(task, "train")]
    order = random.Random(0)
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        loss_of(adapted, pack(order.sample(samples, BATCH))).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight in weights:  # or its file would hold what bfloat16 drops too, at three times the size
            weight.copy_(weight.bfloat16())
    adapted.save_pretrained(str(out))
