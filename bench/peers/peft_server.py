"""A server as one would write around PEFT: `python -m bench.peers.peft_server --base FOLDER --adapter NAME=FOLDER ...`.

All adapters are loaded beside one base. One thread generates: it takes the request that has waited longest and, with
it, all that wait for the same adapter, switches to that adapter and generates for them as one padded batch. With
`--mixed`, a batch takes requests of different adapters, each of its rows naming its own. Imports nothing of ours: it
runs in the peers' environment.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from peft import PeftModel
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "base"


class Chat(BaseModel):
    """The part of OpenAI's request that this server knows, and `ignore_eos`."""

    model: str
    messages: list[dict[str, str]]
    max_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request in the queue, and where its answer goes: the tokens made."""

    adapter: str
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    answer: Future[list[int]] = field(default_factory=Future)


class Generator:
    """Batched greedy generation with adapters, on a thread of its own."""

    def __init__(self, base: Path, adapters: Mapping[str, Path], dtype: str, max_batch: int, mixed: bool) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        for name, folder in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, autocast_adapter_dtype=False)
            else:
                model = PeftModel.from_pretrained(model, str(folder), name, autocast_adapter_dtype=False)
        self.model = model.to(getattr(torch, dtype)).eval()
        self.names = {BASE, *adapters}
        self._max_batch, self._mixed = max_batch, mixed
        self._queue: list[Waiting] = []
        self._arrived = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, waiting: Waiting) -> None:
        with self._arrived:
            self._queue.append(waiting)
            self._arrived.notify()

    def _take(self) -> list[Waiting]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._queue)
            first = self._queue[0]
            fits = [
                one
                for one in self._queue
                if one.ignore_eos == first.ignore_eos and (self._mixed or one.adapter == first.adapter)
            ][: self._max_batch]
            self._queue = [one for one in self._queue if one not in fits]
            return fits

    def _run(self) -> None:
        while True:
            batch = self._take()
            try:
                made = self.generate(batch)
            except Exception as error:
                for one in batch:
                    one.answer.set_exception(error)
                continue
            for one, tokens in zip(batch, made, strict=True):
                one.answer.set_result(tokens)

    @torch.inference_mode()
    def generate(self, batch: list[Waiting]) -> list[list[int]]:
        """The tokens of every answer; a batch goes on until its longest is done."""
        inputs = self.tokenizer.pad({"input_ids": [one.prompt for one in batch]}, return_tensors="pt")
        most = max(one.max_tokens for one in batch)
        options: dict[str, Any] = {"max_new_tokens": most, "do_sample": False}
        if batch[0].ignore_eos:
            options["min_new_tokens"] = most
        context: Any = nullcontext()
        if self._mixed:
            options["adapter_names"] = ["__base__" if one.adapter == BASE else one.adapter for one in batch]
        elif batch[0].adapter == BASE:
            context = self.model.disable_adapter()
        else:
            self.model.set_adapter(batch[0].adapter)
        with context:
            made = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._own(one, tokens) for one, tokens in zip(batch, made, strict=True)]

    def _own(self, one: Waiting, tokens: list[int]) -> list[int]:
        tokens = tokens[: one.max_tokens]
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end)] if not one.ignore_eos and end in tokens else tokens


def app_of(generator: Generator) -> FastAPI:
    """The HTTP layer."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(body: Chat) -> dict[str, Any]:
        if body.model not in generator.names:
            raise HTTPException(404, f"there is no adapter {body.model!r}")
        templated: Any = generator.tokenizer.apply_chat_template(
            body.messages, add_generation_prompt=True, return_dict=True
        )
        prompt = list(templated["input_ids"])
        waiting = Waiting(body.model, prompt, body.max_tokens, body.ignore_eos)
        generator.submit(waiting)
        tokens = await asyncio.wrap_future(waiting.answer)
        text = generator.tokenizer.decode(tokens, skip_special_tokens=True)
        return {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)},
        }

    return app


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.peft_server", description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", action="append", required=True, help="NAME=FOLDER, as often as wanted")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--mixed", action="store_true", help="rows of different adapters in one batch")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    adapters = {name: Path(folder) for name, _, folder in (one.partition("=") for one in given.adapter)}
    generator = Generator(given.base, adapters, given.dtype, given.max_batch, given.mixed)
    uvicorn.run(app_of(generator), port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
