"""The README shows what was measured: its tables are those of the committed results."""

from __future__ import annotations

from bench.bars import README, bars_table, with_tables


def test_the_readme_s_tables_are_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run `python -m bench.bars --readme`"


def test_a_stale_table_is_noticed() -> None:
    text = "<!-- bars:begin -->\nold\n<!-- bars:end -->"
    assert with_tables(text) == f"<!-- bars:begin -->\n{bars_table()}\n<!-- bars:end -->"
