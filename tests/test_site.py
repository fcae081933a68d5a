"""The documents build as a site, warnings are errors, and a page asks nothing of another host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LOADED = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)|<link[^>]*\shref=[\"']?([^\"'\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)], cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert built.returncode == 0 and not built.stderr, built.stderr
    return out


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    loaded = {address for page in pages for found in LOADED.findall(page.read_text()) for address in found if address}
    assert len(pages) > 25 and len(loaded) > 5
    assert not [address for address in loaded if "//" in address]
    assert not [sheet for sheet in site.rglob("*.css") if re.search(r"url\([\"']?https?:|@import", sheet.read_text())]


def test_documents_beside_the_code_are_whole_pages(site: Path) -> None:
    assert "overlapping batch means" in (site / "reference" / "intervals" / "index.html").read_text()
    assert 'href="../reference/metrics/"' in (site / "report" / "index.html").read_text()
