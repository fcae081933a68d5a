"""The page of an audit in Chromium: the verdict is in sight, on a phone and on a desk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_audit_report import CURRENT, EQUAL, GOOD, rented, report, table

from harness.analysis.report.audit import audit_sections
from harness.analysis.report.page import write_sections_page


@pytest.mark.parametrize("width", [375, 1280, 1300])
def test_no_table_is_wider_than_the_page(browser: Any, width: int, tmp_path: Path) -> None:
    found = report(
        replace(CURRENT, name="smollm2-135m-instruct on aws-m7a.large", again=(table(GOOD),)),
        rented("smollm2-135m-int8-gptq on aws-m7a.large", 20),
        replace(EQUAL, name="gemma3-270m-few-shot on aws-m7a.large", slo_met=False, load="not loaded"),
    )
    page = tmp_path / "audit.html"
    write_sections_page(page, "audit", audit_sections(found), found.made)
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(f"file://{page}")
    boxes = tab.evaluate(
        "[...document.querySelectorAll('table')].map(t => [t.scrollWidth, t.parentElement.clientWidth])"
    )
    verdict = tab.get_by_text("do not switch: misses the SLO").last.bounding_box()
    tab.close()
    assert len(boxes) >= 6 and all(wide <= box for wide, box in boxes), boxes
    assert verdict is not None and verdict["x"] + verdict["width"] <= width
