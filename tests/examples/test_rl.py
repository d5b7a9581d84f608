"""Reinforcement learning in bfloat16: small updates are lost, good answers become likelier, and a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import rl
from examples.half_adam import HalfAdam
from examples.tasks.task import Row, Task
from store.samples import Sample
from tests.tiny import config, tokenizer

TASK = Task(name="letters", summary="", build=list, hint="One letter.")


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made: torch.nn.Module = AutoModelForCausalLM.from_config(config(), attn_implementation="eager")
    return made.to(torch.bfloat16)


def test_updates_below_half_a_step_are_lost_and_others_are_adam_s() -> None:
    weights = torch.tensor([1.0, 0.001, -0.001, 0.0], dtype=torch.bfloat16)
    ours = torch.nn.Parameter(weights.clone())
    theirs = torch.nn.Parameter(weights.float())
    mine, adam = HalfAdam([ours], lr=1e-4), torch.optim.Adam([theirs], lr=1e-4, betas=(0.9, 0.95))
    for _ in range(5):
        for parameter, optimizer in ((ours, mine), (theirs, adam)):
            parameter.grad = torch.full_like(parameter, 0.5)
            optimizer.step()
        theirs.data = theirs.data.bfloat16().float()
    assert torch.equal(ours.data.float(), theirs.data)
    assert ours[0] == 1.0
    assert (ours[1:] < weights[1:]).all()


def test_rewards_and_advantages() -> None:
    assert [rl.reward_of(TASK, text, "b") for text in ("b", " b ", "it is b", "c")] == [1.0, 1.0, 0.5, 0.0]
    assert rl.advantages_of([0.5, 0.5]) == [0.0, 0.0]
    assert rl.advantages_of([1.0, 0.0]) == [1.0, -1.0]


def test_the_loss_raises_what_did_better() -> None:
    policy = model()
    group = rl.Group([Sample((1, 2, 3), (65, 256)), Sample((1, 2, 3), (66, 67, 256))], [1.0, -1.0])

    def chances() -> list[float]:
        with torch.no_grad():
            logits = policy(torch.tensor([[1, 2, 3]])).logits[0, -1].float().log_softmax(-1)
        return logits[[65, 66]].tolist()

    before = chances()
    rl.policy_loss(policy, group).backward()
    HalfAdam(policy.parameters(), lr=1e-3).step()
    after = chances()
    assert after[0] > before[0]
    assert after[1] < before[1]


@pytest.mark.parametrize("stop", [None, 1])
def test_an_interrupted_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None) -> None:
    """What the interruption leaves is taken up: equal weights, equal rewards."""
    monkeypatch.setattr(rl, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(rl, "reward_of", lambda _task, text, _gold: float(len(text) % 3))
    settings = rl.Settings("letters", steps=3, prompts=2, group=3, tokens=3, lr=1e-3)
    rows = [Row(prompt=f"p{n}", answer="b") for n in range(6)]

    def run(out: Path, policy: torch.nn.Module) -> list[float]:
        got: list[float] = rl.train(policy, tokenizer(), rows, TASK, settings, out, resume=True)["reward"]
        return got

    straight = model()
    rewards = run(tmp_path / "straight", straight)
    again = model()
    if stop is not None:
        sampled = rl.rollouts

        def interrupted(*args: object, **options: object) -> object:
            if (tmp_path / "again" / "checkpoint-000001").is_dir():
                raise KeyboardInterrupt
            return sampled(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(rl, "rollouts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again", again)
        monkeypatch.setattr(rl, "rollouts", sampled)
        again = model()
    assert run(tmp_path / "again", again) == rewards
    for one, other in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
