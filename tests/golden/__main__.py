"""Accept on purpose what the command line prints now: ``python -m tests.golden [--figures] [CASE...]``.

Prints every difference. Where prose alone has changed the expected file is written again; where a figure, a verdict or
a field has, only with ``--figures``. Status 1: something was left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.golden.cases import CASES, EXPECTED, differences, expected, printed, unpacked


def main() -> int:
    """Compare, and write what may be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--figures", action="store_true", help="also where a figure, a verdict or a field changes")
    asked = parser.parse_args()
    left = False
    with tempfile.TemporaryDirectory() as folder, unpacked(Path(folder)):
        for case in asked.cases or CASES:
            now = printed(case)
            file = EXPECTED / f"{case}.json"
            found = list(differences(expected(case), now)) if file.exists() else []
            for words, _ in found:
                print(f"{case}{words}")
            if any(figure for _, figure in found) and not asked.figures:
                left = True
                print(f"{case}: not written: more than prose has changed; --figures accepts that")
            elif found or not file.exists():
                file.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
                print(f"{case}: written")
    return int(left)


if __name__ == "__main__":
    sys.exit(main())
