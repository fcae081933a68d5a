"""Tables in a terminal: a column is folded between words, or moves below, and no figure is ever cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

GAP = 2
NARROW, LONGEST_WORD = 12, 26
"""A column this narrow stays whole; a word longer than this (a name, a path) may be broken."""


def text_tables(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: Collection[int] | None = None
) -> Iterable[Table]:
    """A table for ``width`` columns, or several below each other that repeat the first column (as pandas does).

    ``right``: columns set right, all but the first unless stated. A line break in a cell stays only where lines are too
    short for the whole table.
    """
    right = range(1, len(heads)) if right is None else right
    joined = [[text.replace("\n", " ") for text in row] for row in rows]
    if sum(_natural(heads, joined)) + GAP * (len(heads) - 1) <= width:
        rows = joined
    columns = [[head, *(row[k] for row in rows)] for k, head in enumerate(heads)]
    natural = _natural(heads, rows)
    least = [_least(column, wide) for column, wide in zip(columns, natural, strict=True)]
    for group in _groups(least, width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
        for k, wide in zip(group, _widths(group, natural, least, width), strict=True):
            table.add_column(Text(heads[k]), justify="right" if k in right else "left", overflow="fold", width=wide)
        for row in rows:
            table.add_row(*(Text(row[k]) for k in group))
        yield table


def _natural(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(cell_len(line) for text in (head, *(row[k] for row in rows)) for line in text.split("\n"))
        for k, head in enumerate(heads)
    ]


def _least(column: Sequence[str], natural: int) -> int:
    longest = max((cell_len(word) for text in column for word in text.split()), default=0)
    return min(natural, max(NARROW, min(longest, LONGEST_WORD)))


def _groups(least: Sequence[int], width: int) -> list[list[int]]:
    """Columns that fit beside each other, each group with the first of all."""
    groups = [[0]]
    for k in range(1, len(least)):
        if len(groups[-1]) > 1 and sum(least[j] + GAP for j in (*groups[-1], k)) - GAP > width:
            groups.append([0])
        groups[-1].append(k)
    return groups


def _widths(group: Sequence[int], natural: Sequence[int], least: Sequence[int], width: int) -> list[int]:
    """What each column gets: the widest give way first."""
    widths = [natural[k] for k in group]
    while sum(widths) + GAP * (len(group) - 1) > width:
        spare = [j for j, k in enumerate(group) if widths[j] > least[k]]
        if not spare:
            break
        widths[max(spare, key=lambda j: widths[j])] -= 1
    return widths
