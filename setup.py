"""What pyproject.toml cannot say: a compiled reader that may be absent, and links that work on an index.

HARNESS_PURE=1 leaves the compiled reader out: the wheel is then the same for every platform, and says so in its name.
Where there is no C compiler the build goes on without it, too; the client reads in Python (scenarios/client/reader.py).

HARNESS_REPOSITORY=https://... is the forge's page of this project. The release workflow knows it; with it the links of
the README lead there and the package has its URLs. Without it the README's links would lead nowhere on an index, and
are left out.
"""

import os
import re
import tomllib
from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
READER = Extension(
    "harness.scenarios.client._reader",
    sources=["harness/scenarios/client/_reader.c"],
    py_limited_api=True,  # one binary for Python 3.11 and later
    optional=True,
    extra_compile_args=["-O2"],
)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def for_index(readme: str, repository: str, ref: str) -> str:
    """The README with absolute links, or without links where no ``repository`` is known."""

    def absolute(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target:
            return link[0]
        if not repository:
            return "" if link["image"] else link["text"]
        path = f"README.md{target}" if target.startswith("#") else target
        return f"{link['image']}[{link['text']}]({repository}/{'raw' if link['image'] else 'blob'}/{ref}/{path})"

    return _LINK.sub(absolute, readme)


if __name__ == "__main__":
    pure = os.environ.get("HARNESS_PURE", "") not in ("", "0")
    repository = os.environ.get("HARNESS_REPOSITORY", "").rstrip("/")
    tag = f"v{tomllib.loads((HERE / 'pyproject.toml').read_text(encoding='utf-8'))['project']['version']}"
    pages = {"Repository": "", "Changelog": f"/blob/{tag}/CHANGELOG.md", "Issues": "/issues"}
    setup(
        long_description=for_index((HERE / "README.md").read_text(encoding="utf-8"), repository, tag),
        long_description_content_type="text/markdown",
        project_urls={name: repository + page for name, page in pages.items()} if repository else {},
        ext_modules=[] if pure else [READER],
        options={} if pure else {"bdist_wheel": {"py_limited_api": "cp311"}},
    )
