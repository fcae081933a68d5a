"""The command that a message gives to install what is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from harness import install


@pytest.mark.parametrize(
    ("direct_url", "command"),
    [
        ('{"url": "file:///home/a%20b/harness", "dir_info": {"editable": true}}',
         "pip install -e '/home/a b/harness[audit]'"),
        ('{"url": "file:///src", "dir_info": {}}', "pip install '/src[audit]'"),
        ('{"url": "file:///w/llm_harness-0.2.0-py3-none-any.whl", "archive_info": {"hashes": {"sha256": "0"}}}',
         "pip install 'llm-harness[audit] @ file:///w/llm_harness-0.2.0-py3-none-any.whl'"),
        ('{"url": "https://example.com/harness.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
         "pip install 'llm-harness[audit] @ git+https://example.com/harness.git@abc'"),
    ],
)  # fmt: skip
def test_an_extra_comes_from_where_the_package_came_from(
    monkeypatch: pytest.MonkeyPatch, direct_url: str, command: str
) -> None:
    class Installed:
        def read_text(self, name: str) -> str:
            assert name == "direct_url.json"
            return direct_url

    monkeypatch.setattr(install, "distribution", lambda name: Installed())
    assert install.install_command("audit") == command


@pytest.mark.parametrize("told", [None, "", "{}", "nonsense", '{"url": 3}'])
def test_from_an_index_the_name_is_enough(monkeypatch: pytest.MonkeyPatch, told: str | None) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            return told

    monkeypatch.setattr(install, "distribution", lambda name: Installed())
    assert install.install_command("cpu") == "pip install 'llm-harness[cpu]'"


def test_what_is_not_installed_is_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_installed(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(install, "distribution", none_installed)
    assert install.install_command() == f"pip install -e {Path(install.__file__).resolve().parents[1]}"


def test_once_published_the_name_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PUBLISHED", True)
    assert install.install_command("cpu") == "pip install 'llm-harness[cpu]'"
    assert install.install_command() == "pip install llm-harness"
