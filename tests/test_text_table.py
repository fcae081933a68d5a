"""Tables in a terminal: whatever the width, every word of every cell is there, and no line is longer."""

from __future__ import annotations

import io
import re

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_capacity import sweep_run

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.report.capacity_text import capacity_sections
from harness.analysis.report.document import render_text
from harness.console import LONGEST_WORD, text_tables

WORDS = st.lists(st.text("abcxyz0123456789.,%", min_size=1, max_size=LONGEST_WORD), min_size=1, max_size=6)
TABLES = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(WORDS.map(" ".join), min_size=n, max_size=n), min_size=2, max_size=5)
)


def printed(heads, rows, width) -> list[str]:
    out = io.StringIO()
    for table in text_tables(heads, rows, width):
        Console(file=out, width=width, highlight=False).print(table)
    return out.getvalue().splitlines()


@settings(max_examples=40)
@given(TABLES, st.sampled_from([60, 80, 120, 240]))
def test_no_word_is_cut_and_no_line_is_too_long(table, width):
    lines = printed(table[0], table[1:], width)
    assert max(map(len, lines)) <= width
    said = set(" ".join(lines).split())
    assert {word for row in table for cell in row for word in cell.split()} <= said


def test_what_fits_is_one_table_and_what_does_not_repeats_the_first_column():
    heads, rows = ["tier", *(f"USD {k}" for k in range(9))], [["a" * 20, *(f"1234.{k}" for k in range(9))]]
    assert len(printed(heads, rows, 240)) == 3
    narrow = "\n".join(printed(heads, rows, 60))
    assert narrow.count("tier") == narrow.count("a" * 20) == 2
    assert [f"1234.{k}" in narrow for k in range(9)] == [True] * 9


def test_capacity_and_its_price_lose_no_figure_in_a_narrow_terminal(tmp_path):
    found = serving_configs([sweep_run(tmp_path / f"{r}", r, slow) for r, slow in ((2, 0), (4, 0), (8, 20))])

    def figures(width):
        out = io.StringIO()
        render_text(capacity_sections(found), Console(file=out, width=width, highlight=False))
        return set(re.findall(r"\d[\d.,]*", out.getvalue()))

    assert figures(240) == figures(80) == figures(60)
