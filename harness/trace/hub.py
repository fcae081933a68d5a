"""Traces on the Hugging Face Hub: ``hf://datasets/ORG/NAME[@REVISION][/CONFIG or /FILE][:SPLIT]``.

A file of the dataset is read as it is. Without one the rows are those of the Parquet that the Hub makes of every public
dataset, whatever its own format, in folders CONFIG/SPLIT: a folder is named where there are several. Files are kept in
the Hub's own cache; its token (HF_TOKEN), mirror (HF_ENDPOINT) and offline mode hold.
Source: https://huggingface.co/docs/dataset-viewer/parquet, https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.errors import TraceError, listed
from harness.terminal import printable
from harness.trace.source import TraceFile

CONVERTED = "refs/convert/parquet"
_URL = re.compile(
    r"hf://datasets/(?P<dataset>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.\-~^]+))?(/(?P<path>[^:]*?))?/?(:(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    dataset: str
    revision: str | None
    path: str
    split: str | None

    @property
    def is_file(self) -> bool:
        return self.split is None and "." in PurePosixPath(self.path).name


def is_dataset(name: str) -> bool:
    """Whether a name is one on the Hub."""
    return name.startswith("hf://")


def dataset_files(url: str) -> list[TraceFile]:
    """The files that ``url`` stands for, fetched. Raises `TraceError` with what there is, where it stands for none."""
    match = _URL.fullmatch(url)
    if match is None:
        raise TraceError(url, None, "expected hf://datasets/ORG/NAME, with :SPLIT, /CONFIG:SPLIT or /FILE")
    asked = _Asked(dataset=match["dataset"], revision=match["revision"], path=match["path"] or "", split=match["split"])
    try:
        from huggingface_hub import HfApi, hf_hub_download

        endpoint = os.environ.get("HF_ENDPOINT")
        revision, names = asked.revision, [asked.path]
        if not asked.is_file:
            revision = revision or CONVERTED
            api = HfApi(endpoint=endpoint)
            names = _chosen(url, asked, api.list_repo_files(asked.dataset, repo_type="dataset", revision=revision))
        return [
            _file(
                f"hf://datasets/{asked.dataset}/{name}",
                hf_hub_download(asked.dataset, name, repo_type="dataset", revision=revision, endpoint=endpoint),
                named=len(names) == 1,
            )
            for name in names
        ]
    except TraceError:
        raise
    except Exception as e:  # the library's own errors have no common base, and those of HTTP are another library's
        problem = f"{type(e).__name__}: {e}".splitlines()[0]
        raise TraceError(url, None, f"cannot read from the Hugging Face Hub: {printable(problem)}") from e


def _chosen(url: str, asked: _Asked, found: list[str]) -> list[str]:
    """The Parquet files of the one config and split that are meant."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in sorted(found):
        folders = PurePosixPath(name).parts[:-1]
        if name.endswith(".parquet"):
            parts.setdefault(("/".join(folders[:-1]), folders[-1] if folders else ""), []).append(name)
    wanted = [
        key for key in parts if (not asked.path or key[0] == asked.path) and asked.split in (None, key[1])
    ]  # fmt: skip
    if len(wanted) == 1:
        return parts[wanted[0]]
    there = [f"hf://datasets/{asked.dataset}/{config}:{split}" for config, split in wanted or parts]
    problem = "several parts: name one" if wanted else "no such part" if parts else "no Parquet file"
    raise TraceError(url, None, f"{problem}{': ' if there else ''}{printable(listed(there)) if there else ''}")


def _file(name: str, path: str, *, named: bool) -> TraceFile:
    with Path(path).open("rb") as raw:
        return TraceFile(printable(name), Path(path), hashlib.file_digest(raw, "sha256").hexdigest(), named=named)
