"""What the documents hold: fenced blocks with their marks, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
"""Pages of the site alone. What it shows from elsewhere is in `docs/mounted.py`."""
REASONS = (
    "installs packages", "downloads packages", "on another host",
    "needs a GPU", "needs a cluster", "needs AWS", "needs Kubernetes", "needs a container builder",
    "needs the network", "needs a browser", "takes minutes", "run by its own test",
)  # fmt: skip
"""Why `tests/test_documents.py` does not run a block of commands. Above it stands ``<!-- not run: needs a GPU -->``."""
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
_INLINE = re.compile(r"`(harness [^`]+)`")
_COMMAND = re.compile(
    r"(?:^|[|;&(] *|[A-Z_]+=\S+ +|do +|nice -n \d+ )harness +(?P<rest>[^|;&)']*(?:'[^']*'[^|;&)']*)*)"
)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. ``reason``: why it is not run, where the document says so."""

    line: int
    language: str
    reason: str | None
    text: str


def blocks(document: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    for found in _BLOCK.finditer(document):
        line = document.count("\n", 0, found.start("text"))
        indent = found["indent"]
        text = "".join(part.removeprefix(indent) for part in found["text"].splitlines(keepends=True))
        yield Block(line, found["language"], found["reason"], text)


def commands(document: str) -> Iterator[list[str]]:
    """Arguments of each `harness` command in fenced blocks and inline code."""
    lines = [line for block in blocks(document) for line in block.text.replace("\\\n", " ").splitlines()]
    for line in (*lines, *_INLINE.findall(document)):
        for found in _COMMAND.finditer(line.strip()):
            yield shlex.split(found["rest"], comments=True)
