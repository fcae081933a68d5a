"""Old run directories give the same figures for ever: tests/golden/README.md says what they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.golden.cases import CASES, EXPECTED, differences, expected, printed, unpacked
from tests.schemas import check


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with unpacked(tmp_path_factory.mktemp("golden")):
        yield


@pytest.mark.parametrize("case", CASES)
def test_an_old_run_gives_the_same_figures(case: str) -> None:
    now = printed(case)
    assert [words for words, _ in differences(expected(case), now)] == []
    if now["printed"]:
        check(now["printed"])


def test_every_expected_file_has_its_case() -> None:
    assert {file.stem for file in EXPECTED.iterdir()} == set(CASES)


def test_what_counts_as_a_difference() -> None:
    was = {
        "made": "1",
        "n": 3,
        "x": 1.5,
        "verdict": "VALID",
        "note": "of 12 requests, 8 days ago",
        "rows": [1, None],
    }
    assert not list(differences(was, {**was, "made": "2", "new": 1, "note": "of 12 requests, 9 days ago"}))
    changed = [("n", 4), ("x", 1.5 + 1e-8), ("verdict", "INVALID"), ("rows", [1, 0.0]), ("rows", [1]), ("n", None)]
    for key, value in changed:
        assert [figure for _, figure in differences(was, {**was, key: value})] == [True], key
    assert [figure for _, figure in differences(was, {"made": "1"})] == [True] * 5
    assert [figure for _, figure in differences(was, {**was, "note": "of 12 requests, long ago"})] == [False]
