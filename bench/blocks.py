"""Do different experts for different blocks of layers answer what needs two skills?

`python -m bench.blocks --base FOLDER --experts FOLDER` asks for numbers in French *and* in Spanish words, as
`bench.routing` does through the server, of models that are merged offline: one expert below a layer and the other from
it on, at three heights and both ways round, beside each expert alone and half of both. A right half counts a half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file

from bench.report import show, write
from bench.routing_tasks import BOTH, BOTH_TOKENS, numbers_in_both
from examples.evaluate import answers
from examples.fetch import CACHE
from examples.finetune import load_base
from store.apply import apply_expert

State = Mapping[str, torch.Tensor]
HEIGHTS = (1 / 4, 1 / 2, 3 / 4)


def stacked(lower: State, upper: State, border: int) -> dict[str, torch.Tensor]:
    """The layers below `border` and the embedding of one model, and all the rest of another."""
    return {name: (lower if _is_below(name, border) else upper)[name] for name in lower}


def _is_below(name: str, border: int) -> bool:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) < border if "layers" in parts else "embed_tokens" in parts


def halved(one: State, other: State) -> dict[str, torch.Tensor]:
    """Half of both experts: the mean of the two models."""
    return {name: (value + other[name]) / 2 for name, value in one.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base folder (safetensors)")
    parser.add_argument("--experts", type=Path, default=Path("examples/experts"), help="folder of the shipped experts")
    parser.add_argument("-n", type=int, default=100, help="prompts (default 100)")
    args = parser.parse_args()
    model, tokenizer = load_base(args.base, torch.device("cpu"))
    model.eval()
    layers = model.config.num_hidden_layers
    fr, es = (
        apply_expert(args.experts / f"{name}.safetensors", args.base, cache_dir=CACHE.parent)
        for name in ("num_fr", "num_es")
    )
    ways: dict[str, State] = {
        "base": load_file(args.base / "model.safetensors"),
        "num_fr": fr,
        "num_es": es,
        "half of each": halved(fr, es),
    }
    for border in (round(height * layers) for height in HEIGHTS):
        ways[f"num_fr below layer {border}, num_es from it on"] = stacked(fr, es, border)
        ways[f"num_es below layer {border}, num_fr from it on"] = stacked(es, fr, border)
    numbers = numbers_in_both(args.n)
    prompts = [BOTH.format(number) for number, _ in numbers]
    rows = []
    for way, state in track(ways.items(), "ways", total=len(ways)):
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        found = answers(model, tokenizer, prompts, BOTH_TOKENS)
        halves = sum(half in text.lower() for text, (_, pair) in zip(found, numbers, strict=True) for half in pair)
        rows.append({"weights": way, "n": len(prompts), "score": halves / 2 / len(prompts)})
    show(rows, title="a number in French and in Spanish words")
    write("blocks", f"python -m bench.blocks {' '.join(sys.argv[1:])}".strip(), rows, [])


if __name__ == "__main__":
    main()
