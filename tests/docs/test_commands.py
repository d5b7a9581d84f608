"""Every command of the README and of docs/ is run, unless a marker beside it says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import KEYS, ROOT, Block, blocks_of, pages
from tests.docs.sandbox import Sandbox
from tests.zygote import Zygote

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
BLOCKS = {page: blocks_of(page, text) for page, text in TEXTS.items()}
Make = Callable[..., Sandbox]


@pytest.fixture
def sandbox(tmp_path: Path, world: Path, cache: Path, zygote: Zygote) -> Iterator[Make]:
    made: list[Sandbox] = []

    def make(keys: bool = False) -> Sandbox:
        made.append(Sandbox(tmp_path, world, cache, zygote, keys=keys))
        return made[-1]

    yield make
    for one in made:
        one.close()


def check(page: str, sandbox: Make, *, slow: bool) -> None:
    wanted = [block for block in BLOCKS[page] if block.runs(slow=slow)]
    here = sandbox(keys=KEYS in TEXTS[page])
    here.run(wanted)
    assert [name for name in here.ran if name != "-"] == [f"{page}:{block.line}" for block in wanted]


@pytest.mark.parametrize("page", [p for p, blocks in BLOCKS.items() if any(b.runs(slow=False) for b in blocks)])
def test_the_commands_of(page: str, sandbox: Make) -> None:
    check(page, sandbox, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p, blocks in BLOCKS.items() if any(b.mark == "slow" for b in blocks)])
def test_also_the_slow_commands_of(page: str, sandbox: Make) -> None:
    check(page, sandbox, slow=True)


def test_pages_are_found() -> None:
    assert {"README.md", "docs/api.md", "docs/operations.md"} <= BLOCKS.keys()
    assert sum(block.mark is None for blocks in BLOCKS.values() for block in blocks) > 20


FAILING = [
    ("sh", "false\ntrue"),
    ("sh", "curl -s http://127.0.0.1:8000/v1/models/nobody"),
    ("sh", "switchyard rm nobody"),
    ("python", "raise SystemExit(3)"),
    ("console", "$ false\noutput"),
    ("sh", "switchyard serve --base ./nowhere"),
]


def test_a_command_that_fails_is_noticed(sandbox: Make) -> None:
    here = sandbox()
    for line, (language, commands) in enumerate(FAILING, start=1):
        with pytest.raises(AssertionError, match=rf"page\.md:{line} failed"):
            here.run([Block("page.md", line, language, commands)])
    assert here.ran == ["-"]  # the server that two of them ask


def test_markers_are_read() -> None:
    text = (
        "x\n\n<!-- not run: wants a GPU -->\n```sh\na\n```\n\n<!-- slow: long -->\n```python\nb\n```\n"
        "```console\n$ c\nd\n```\n"
    )
    first, second, third = blocks_of("page.md", text)
    assert (first.mark, first.reason, first.line) == ("not run", "wants a GPU", 4)
    assert (second.mark, second.runs(slow=False), second.runs(slow=True)) == ("slow", False, True)
    assert (third.runs(slow=False), third.commands) == (True, "c\n")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run -->\n```sh\na\n```\n",
        "<!-- not run: x -->\n\n```sh\na\n```\n",
        "<!-- slow: x -->\n```json\n1\n```\n",
    ],
)
def test_a_marker_must_say_why_and_of_what(text: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md:1"):
        blocks_of("page.md", text)
