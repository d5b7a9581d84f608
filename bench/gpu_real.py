"""The demo's base and its real experts on the device, if they are at hand: do they answer as on the CPU, how fast?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench.gpu_lab import Lab
from bench.report import ROOT, Row
from server.engine.engine import TransformersEngine
from server.engine.options import EngineSettings, Mode
from server.engine.types import EngineRequest, SamplingParams
from store.expert_file import digest_of
from store.mix import BASE_MIX, Mix

EXPERTS = ROOT / "examples" / "experts"
"""The demo's."""
_PROMPT = "Turn this into a cron expression: every day at half past six in the morning."


def base_at_hand(root: Path = ROOT) -> Path | None:
    """The demo's base, converted, if it has been fetched here."""
    found = sorted((root / ".cache" / "base").glob("smollm2-135m*/config.json"))
    return found[0].parent if found else None


def real(lab: Lab, base: Path, experts: Path, kernels: str) -> list[Row]:
    """Greedy answers of every expert in both modes, alone and all together, and whether they are the CPU's."""
    files = {digest_of(path): path for path in sorted(experts.glob("*.safetensors"))}
    tokens = 32 if lab.on_gpu else 3
    expected = asyncio.run(_answers(base, files, "cpu", "float32", "auto", Mode.MIXED, tokens))[0]
    rows: list[Row] = []
    for mode in (Mode.MIXED, Mode.MERGED):
        settings = (str(lab.device), "float32", kernels, mode, tokens)
        given, seconds = asyncio.run(_answers(base, files, *settings))
        pairs = list(zip(given, expected, strict=True))
        same = sum(a == b for answer, right in pairs for a, b in zip(answer, right, strict=False))
        rows.append({"what": "answers in float32", "mode": mode.value, "experts": len(files),
                     "tokens as on the CPU": same / sum(len(right) for right in expected),
                     "tokens/s": sum(map(len, given)) / seconds})  # fmt: skip
    return rows


async def _answers(
    base: Path, files: dict[str, Path], device: str, dtype: str, kernels: str, mode: Mode, tokens: int
) -> tuple[list[list[int]], float]:
    """One answer by each expert and by the base, all at once; and the seconds of a second round."""
    settings = EngineSettings(device=device, dtype=dtype, kernels=kernels, mode=mode, kv_bytes=256 << 20)
    engine = TransformersEngine(
        base, name="base", settings=settings, read_expert=lambda digest: files[digest].read_bytes(), cache_dir=None
    )
    await engine.start()
    prompt = tuple(engine.tokenizer.encode_chat([{"role": "user", "content": _PROMPT}]))

    async def one(mix: Mix) -> list[int]:
        request = EngineRequest(prompt, SamplingParams(tokens, 0.0, ignore_eos=True), mix)
        return [event.token async for event in engine.submit(request) if event.token is not None]

    mixes = [BASE_MIX, *(Mix.of({digest: 1.0}) for digest in files)]
    try:
        await asyncio.gather(*(one(mix) for mix in mixes))
        began = time.perf_counter()
        answers = await asyncio.gather(*(one(mix) for mix in mixes))
        return list(answers), time.perf_counter() - began
    finally:
        await engine.stop()
