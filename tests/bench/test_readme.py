"""The pages show what was measured: their tables are those of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.bars import PAGES, bars_table, with_tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python -m bench.bars --readme`"


def test_a_stale_table_is_noticed() -> None:
    text = "<!-- bars:begin -->\nold\n<!-- bars:end -->"
    assert with_tables(text) == f"<!-- bars:begin -->\n{bars_table()}\n<!-- bars:end -->"
