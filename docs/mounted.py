"""MkDocs hook: documents that stand beside the code are pages of the site as they are, and links fit both places.

A document is written for the repository: its links are paths from its own folder, so they work on any forge. Here a
link to a document that the site has becomes one to its page, and a link to another file of the repository becomes one
to the forge (`repo_url`), or plain words while there is none.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
MOUNTED = {
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "cluster.md": "cluster/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "reference/checks.md": "harness/checks/CHECKS.md",
    "reference/intervals.md": "analysis/INTERVALS.md",
    "reference/metrics.md": "analysis/METRICS.md",
    "reference/prices.md": "analysis/PRICES.md",
    "reference/traces.md": "scenarios/traces/README.md",
}
"""Page of the site: document of the repository."""
_PAGE_OF = {document: page for page, document in MOUNTED.items()}
_LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that stand elsewhere."""
    for page, document in MOUNTED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / document)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with its links turned into those of the site."""
    here = page.file.src_uri
    document = MOUNTED.get(here, f"docs/{here}")
    parts, at = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_linked(markdown[at : fence.start()], here, document, config.repo_url), fence[0]]
        at = fence.end()
    return "".join([*parts, _linked(markdown[at:], here, document, config.repo_url)])


def _linked(text: str, here: str, document: str, forge: str | None) -> str:
    def turned(link: re.Match[str]) -> str:
        target, _, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
        page = _PAGE_OF.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
        if page is not None:
            to = os.path.relpath(page, posixpath.dirname(here) or ".") + (f"#{anchor}" if anchor else "")
            return f"{link['text']}({to})"
        if not (ROOT / file).exists():
            raise PluginError(f"{document}: link to {link['target']}, and there is no {file} in the repository")
        if forge:
            return f"{link['text']}({forge.rstrip('/')}/blob/main/{file})"
        return link["text"].strip("[]")

    return _LINK.sub(turned, text)
