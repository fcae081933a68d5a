"""A folder of runs in a browser: the newest of them in one page, whatever else lies there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from run_files import SPEC, TIER, good, write_run
from test_page import EVIL, Page

from harness.cli import cli
from harness.errors import ResultsError


@pytest.fixture
def folder(tmp_path):
    """Three good runs of different prices and loads, one of them in a sweep's folder, an INVALID one, a broken one."""
    root = tmp_path / "runs"
    slo = replace(SPEC, slo={"ttft": 0.2})
    write_run(root / "20261121T000001Z-a", [good(i, lag_ms=1) for i in range(400)], spec=slo)
    write_run(root / "20261121T000002Z-b", [good(i, ttft_ms=90) for i in range(60)], tier=replace(TIER, name="big"))
    write_run(root / "sweep" / "20261121T000003Z-c", [good(i, ttft_ms=300) for i in range(400)], spec=slo)
    write_run(root / "20261121T000004Z-d", [good(0)], status="failed", reason="it broke", model=EVIL)
    broken = write_run(root / "20261121T000005Z-e", [good(0)])
    (broken / "plan.arrow").write_bytes(b"no")
    (root / "notes").mkdir()
    return root


@pytest.fixture
def opened(monkeypatch):
    """What ``harness open`` showed: the page, and what was said."""

    def go(*words):
        shown = []
        monkeypatch.setattr("webbrowser.open", shown.append)
        done = CliRunner().invoke(cli, ["open", *map(str, words)], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        (url,) = shown
        assert url == f"file://{done.stdout.strip()}"
        return Page(Path(done.stdout.strip()).read_text()), done.stderr

    return go


def test_every_run_below_a_folder_is_in_the_page_and_one_that_cannot_be_read_is_named(folder, opened):
    page, said = opened(folder)
    assert "4 runs compared" in page.text
    for name in ("-a", "-b", "-c", "-d"):
        assert f"20261121T00000{ord(name[1]) - 96}Z{name}" in page.text
    assert "20261121T000005Z-e" in said and "plan.arrow" in said
    assert "it broke" in page.text and page.text.count("SLO missed") >= 1


def test_the_newest_are_shown(folder, opened):
    page, _ = opened(folder, "--most", "3")
    assert "-d" in page.text and "000003Z-c" in page.text
    assert "000002Z-b" not in page.text and "000001Z-a" not in page.text


def test_one_run_is_its_own_page_and_links_are_not_followed(folder, opened, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(folder)
    with pytest.raises(ResultsError, match="no run in it"):
        opened(tmp_path / "elsewhere")
    page, _ = opened(folder / "sweep")
    assert "runs compared" not in page.text and "Latency, ms" in page.text
