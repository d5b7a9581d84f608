"""What clients of LiteLLM's proxy are answered: its router, with `deploy/litellm.yaml`. Run fenced, in a process of its
own; prints JSON. The proxy itself needs other versions of packages than this repository has; it is a FastAPI
application around this router."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import litellm
import yaml

CONFIG = Path(__file__).resolve().parents[2] / "deploy" / "litellm.yaml"
MESSAGES = [{"role": "user", "content": "hi"}]


async def _ask(router: litellm.Router) -> dict[str, Any]:
    chat = await router.acompletion(model="cron", messages=MESSAGES, max_tokens=4)
    streamed = await router.acompletion(model="auto", messages=MESSAGES, max_tokens=4, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in streamed]
    mix = [{"id": "cron", "weight": 0.5}, {"id": "french", "weight": -0.25}]
    mixed = await router.acompletion(model="auto", messages=MESSAGES, max_tokens=4, extra_body={"experts": mix})
    text = await router.atext_completion(model="cron", prompt="hi", max_tokens=2, echo=True, logprobs=1)
    embedded = await router.aembedding(model="dummy-base", input=["hi", "ho"])
    return {
        "chat": [chat.choices[0].message.content, chat.usage.switchyard["mix"][0]["id"]],
        "streamed": pieces,
        "mixed": {part["id"]: part["weight"] for part in mixed.usage.switchyard["mix"]},
        "text": [text.choices[0].text, text.choices[0].logprobs.token_logprobs[0]],
        "embedded": len(embedded.data),
        "unknown": await _refused(router.acompletion(model="nobody", messages=MESSAGES)),
        "unsupported": await _refused(router.atext_completion(model="cron", prompt="hi", suffix="end")),
    }


async def _refused(asked: Any) -> list[str]:
    try:
        await asked
    except Exception as error:  # LiteLLM's own classes, which the names tell
        return [type(error).__name__, str(error)]
    return ["answered", ""]


def main() -> None:
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name, value in config["litellm_settings"].items():
        if not hasattr(litellm, name):
            raise AttributeError(f"LiteLLM has no setting {name}")
        setattr(litellm, name, value)
    # Parameters it does not know are refused by it.
    router = litellm.Router(model_list=config["model_list"], **config["router_settings"])
    found = asyncio.run(_ask(router)) | {"general": config["general_settings"]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
