"""A folder of runs as pages: the list, each run, several compared. Reads; what serves the pages is not here.

A run is analysed when it is first looked at, one run at a time, and again when its files have changed. A request names
a run by its place in the folder, and only places that were found by looking are known: no path is built from a request.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from urllib.parse import quote

from analysis.labels import clean
from analysis.report.document import Cell
from analysis.report.figures import VERDICTS, in_seconds, load_cell, price_cell, quantity, state_of, verdict_note
from analysis.report.page import policy, render, render_page
from analysis.report.view import RunView, view_run
from analysis.rows.read import read_run
from analysis.summary import Summary, summarise
from harness.errors import HarnessError, ResultsError, UsageError, sentence
from harness.record.manifest import MANIFEST, read_manifest

DEPTH = 4
"""Levels of folders that are looked through; a sweep's runs lie one below it."""
MOST_RUNS = 5000
MOST_VIEWS = 40
"""Analysed runs that are kept whole; of the others only their line in the list."""
MOST_COMPARED = 24
HEADS = ("Compare", "Run", "Time, UTC", "Tier", "Model", "Verdict", "Load", "TTFT p99", "USD per 1M")

Stamp = tuple[tuple[str, int, int], ...]
"""Name, time of change and size of the files of a run that figures come from."""


class Results:
    """The runs below a folder. Safe to use from several threads; one run is analysed at a time."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ResultsError(f"{folder}: not a folder of runs")
        self._folder = folder
        self._lock = Lock()
        self._views: OrderedDict[str, tuple[Stamp, RunView]] = OrderedDict()
        self._figures: dict[str, tuple[Stamp, Summary | str]] = {}

    def runs(self) -> dict[str, Path]:
        """Run directories by their place in the folder, links not followed, the newest first."""
        found: list[tuple[str, Path]] = []
        top = len(self._folder.parts)
        for where, folders, files in os.walk(self._folder, followlinks=False):
            path = Path(where)
            if MANIFEST in files:
                place = path.relative_to(self._folder).as_posix()
                found.append((place if place != "." else path.resolve().name, path))  # "." is no place in a URL
                folders.clear()
            elif len(path.parts) - top >= DEPTH:
                folders.clear()
            if len(found) >= MOST_RUNS:
                break
        return dict(sorted(found, key=lambda item: (item[1].name, item[0]), reverse=True))

    def waiting(self) -> list[str]:
        """Runs whose figures are not known, the newest first."""
        return [key for key, path in self.runs().items() if self._known(key, path) is None]

    def view(self, key: str) -> RunView:
        """The analysed run. Raises `ResultsError` for a run that is not there, and what its analysis raises."""
        path = self.runs().get(key)
        if path is None:
            raise ResultsError("there is no such run in this folder")
        stamp = _stamp(path)
        with self._lock:
            kept = self._views.get(key)
            if kept is not None and kept[0] == stamp:
                self._views.move_to_end(key)
                return kept[1]
            try:
                run = read_run(path)
                view = view_run(run, summarise(run), clean(key, 80))
            except Exception as e:  # one bad run is one bad line
                why = str(e) if isinstance(e, HarnessError) else sentence(e)
                self._figures[key] = (stamp, why)
                raise ResultsError(f"{key}: {why}") from e
            self._figures[key] = (stamp, view.summary)
            self._views[key] = (stamp, view)
            while len(self._views) > MOST_VIEWS:
                self._views.popitem(last=False)
            return view

    def _known(self, key: str, path: Path) -> Summary | str | None:
        kept = self._figures.get(key)
        return kept[1] if kept is not None and kept[0] == _stamp(path) else None

    def list_page(self) -> str:
        """All runs, each with what is known of it."""
        lines, waiting = list[dict[str, object]](), 0
        for key, path in self.runs().items():
            known = self._known(key, path)
            waiting += known is None
            href = f"/run/{quote(key, errors='surrogateescape')}"
            lines.append({"key": key, "href": href, "cells": _cells(path, known)})
        count = f"{len(lines)} {'run' if len(lines) == 1 else 'runs'}"
        return render(
            "index.html", title=count, folder=str(self._folder), rows=lines, heads=HEADS, right=(6, 7, 8), problem=None,
            waiting=waiting, home=None, policy=policy("'self'"),
        )  # fmt: skip

    def run_page(self, key: str) -> str:
        """The page of one run."""
        return render_page([self.view(key)], home="/")

    def compare_page(self, keys: Sequence[str]) -> str:
        """Several runs side by side. Raises `UsageError` for fewer than two, or too many."""
        keys = list(dict.fromkeys(keys))
        if not 2 <= len(keys) <= MOST_COMPARED:
            raise UsageError(f"tick two to {MOST_COMPARED} runs to compare them; {len(keys)} were ticked")
        return render_page([self.view(key) for key in keys], home="/")


def problem_page(title: str, problem: str) -> str:
    """A page that says what went wrong."""
    return render("index.html", title=title, problem=problem, home="/", policy=policy("'self'"))


def _stamp(path: Path) -> Stamp:
    found = []
    for file in sorted([path / MANIFEST, *path.glob("results-*.arrows")]):
        try:
            facts = file.stat()
        except OSError:
            continue  # gone since it was listed: another stamp, so it is read again
        found.append((file.name, facts.st_mtime_ns, facts.st_size))
    return tuple(found)


def _cells(path: Path, known: Summary | str | None) -> list[Cell]:
    try:
        manifest = read_manifest(path)
    except HarnessError as e:
        return [Cell("-"), Cell("-"), Cell("-"), _unreadable(path, str(e)), *[Cell("-")] * 3]
    cells = [
        Cell(manifest.created.replace("T", " ")[:16]),
        Cell(manifest.tier.name if manifest.tier else "no tier"),
        Cell(manifest.model),
    ]
    if not isinstance(known, Summary):
        status = "not analysed yet" if manifest.status == "complete" else manifest.status
        word = Cell(status, mark="quiet") if known is None else _unreadable(path, known)
        return [*cells, word, *[Cell("-")] * 3]
    verdict, mark = VERDICTS[state_of(known)]
    return [
        *cells,
        Cell(verdict, note=verdict_note(known), mark=mark),
        load_cell(known),
        quantity(known.metrics.ttft.p99, in_seconds),
        price_cell(known, known.cost.usd_per_1m_total),
    ]


def _unreadable(path: Path, why: str) -> Cell:
    return Cell("unreadable", note=why.removeprefix(f"{path}{os.sep}").removeprefix(f"{path}: "), mark="bad")
