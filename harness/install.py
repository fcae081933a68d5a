"""The command that adds an extra to this installation, wherever it came from."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from harness.errors import HarnessError

PACKAGE = "llm-harness"
PUBLISHED = False
"""The package is on PyPI. Until it is, a message names what was installed from: a checkout, a wheel, a Git URL."""


@dataclass(frozen=True, slots=True)
class _Folder:
    editable: bool = False


@dataclass(frozen=True, slots=True)
class _Repository:
    vcs: str
    commit_id: str


@dataclass(frozen=True, slots=True)
class _Origin:
    """What pip writes of where a package came from. Source: PEP 610, ``direct_url.json``."""

    url: str
    dir_info: _Folder | None = None
    vcs_info: _Repository | None = None


def install_command(extra: str = "") -> str:
    """``pip install`` of this package with an extra, from where it was installed; by name once it is on PyPI."""
    wanted = f"{PACKAGE}[{extra}]" if extra else PACKAGE
    if PUBLISHED or (origin := _origin()) is None:
        return f"pip install {shlex.quote(wanted)}"
    if origin.dir_info is not None:
        folder = unquote(urlsplit(origin.url).path)
        editable = "-e " if origin.dir_info.editable else ""
        return f"pip install {editable}{shlex.quote(f'{folder}[{extra}]' if extra else folder)}"
    where = f"{origin.vcs_info.vcs}+{origin.url}@{origin.vcs_info.commit_id}" if origin.vcs_info else origin.url
    return f"pip install {shlex.quote(f'{wanted} @ {where}')}"


def require(module: str, *, extra: str = "", package: str = "") -> ModuleType:
    """An optional module. Raises `HarnessError` where it is missing, with the command that adds ``extra`` of this
    package, or ``package`` itself.
    """
    try:
        return import_module(module)
    except ImportError as e:
        how = f"pip install {package}" if package else install_command(extra)
        raise HarnessError(f"{module.replace('.', '-')} is not installed ({e}): {how}") from e


def _origin() -> _Origin | None:
    """Where pip says that the package came from; not installed: the folder that this file lies in; None: an index."""
    import msgspec  # of which the help of a verb has no need

    try:
        told = distribution(PACKAGE).read_text("direct_url.json")
        return msgspec.json.decode(told, type=_Origin) if told else None
    except PackageNotFoundError:
        return _Origin(url=Path(__file__).resolve().parents[1].as_uri(), dir_info=_Folder(editable=True))
    except msgspec.DecodeError:
        return None
