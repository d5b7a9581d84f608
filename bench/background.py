"""Texts of no particular kind, made up by an instruction-tuned model that is asked nothing.

`python -m bench.background --base FOLDER` writes `router/background_generated.txt`. A model that gets the beginning of
a chat up to where the user speaks goes on with what users say (Magpie, arXiv 2406.08464); one that gets nothing but the
mark between documents goes on with prose, code and lists. Other seeds, machines or dtypes give other texts of the same
kinds. Lines that hold addresses, numbers to call, or words that nobody wants to be shown are left out.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OPENINGS = (
    (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", 12),
    ("<|endoftext|>", 8),
    ("<|im_start|>user\n", 6),
)
"""What the model is shown, and how many batches it goes on from there."""
BATCH = 64
TOKENS = 30
"""The router looks at the first few tokens only."""
LEAST_WORDS = 3
UNWANTED = re.compile(
    r"@|https?:|www\.|phone number|\d{3}[-. ]\d{3,4}|\bsex|porn|nude|kill|murder|suicid|rape|nazi|terror|\bgun|weapon"
    r"|drug|racis|fuck|shit|bitch|damn|nigg|gay|lesbian|slut|whore|erotic|genital",
    re.IGNORECASE,
)
OUT = Path(__file__).resolve().parent.parent / "router" / "background_generated.txt"


def generated(base: Path, seed: int) -> Iterator[str]:
    """What the model says."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.eval()
    torch.manual_seed(seed)
    for opening, batches in OPENINGS:
        ids = tokenizer(opening, add_special_tokens=False, return_tensors="pt").input_ids.repeat(BATCH, 1)
        for _ in track(range(batches), repr(opening[-24:])):
            with torch.inference_mode():
                rows = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_p=0.95, top_k=0,
                    max_new_tokens=TOKENS, pad_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
            yield from (str(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in rows)


def cleaned(texts: Iterable[str]) -> list[str]:
    """One line per text, without repetitions and without what nobody wants to read."""
    lines = (re.sub(r"\s+", " ", text).strip(" -,.;:_") for text in texts)
    fit = (
        line for line in lines if len(line.split()) >= LEAST_WORDS and line.isprintable() and not UNWANTED.search(line)
    )
    return list({line.lower(): line for line in fit}.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.background", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of an instruction-tuned base (safetensors)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = cleaned(generated(args.base, args.seed))
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} texts in {OUT.name}")


if __name__ == "__main__":
    main()
