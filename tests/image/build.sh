#!/usr/bin/env bash
# Builds an image of the Dockerfile on a Debian made from its mirror, and runs it: no registry of images is asked.
#
#   apt-get install buildah mmdebstrap crun      needs root (or a user namespace); then
#   tests/image/build.sh client                  or: cpu
#
# Environment: BUILD (default build/image) keeps the base and buildah's storage: 2 GB for the client, 12 GB for cpu;
# CA: a bundle of certificates to trust while building, as behind a proxy;
# TORCH_WHEELS: a folder with torch for the CPU, where PyTorch's own index cannot be reached.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=${1:?client or cpu}
BUILD=$(realpath -m "${BUILD:-build/image}")
mkdir -p "$BUILD"

export BUILDAH_ISOLATION=chroot
bud() { buildah --root "$BUILD/storage" --runroot "$BUILD/run" "$@"; }

[ -e "$BUILD/base.tar" ] || mmdebstrap --variant=minbase bookworm "$BUILD/base.tar" "${MIRROR:-http://deb.debian.org/debian}"
if ! bud inspect debian-base > /dev/null 2>&1; then
  container=$(bud from scratch)
  bud add --quiet "$container" "$BUILD/base.tar" / > /dev/null
  bud commit --quiet "$container" debian-base
  bud rm "$container" > /dev/null
fi

arguments=(--build-arg BASE=localhost/debian-base)
if [ -n "${CA:-}" ]; then
  mkdir -p "$BUILD/pip" && cp "$CA" "$BUILD/pip/ca.crt" && printf '[global]\ncert = /etc/xdg/pip/ca.crt\n' > "$BUILD/pip/pip.conf"
  arguments+=(--volume "$BUILD/pip:/etc/xdg/pip:ro")
fi
if [ -n "${TORCH_WHEELS:-}" ]; then
  mkdir -p "$BUILD/index/torch"
  (cd "$TORCH_WHEELS" && for wheel in torch-*.whl; do echo "<a href=\"/wheels/$wheel\">$wheel</a><br>"; done) > "$BUILD/index/torch/index.html"
  arguments+=(--volume "$BUILD/index:/index:ro" --volume "$(realpath "$TORCH_WHEELS"):/wheels:ro" --build-arg TORCH_INDEX=file:///index)
fi
bud build --target "$target" "${arguments[@]}" --tag "llm-harness:$target" .

# --- run it: by the entry point that the image names, as its own user and as one that it does not know
trap '[ -z "${container:-}" ] || bud rm "$container" > /dev/null' EXIT
configured() { bud inspect --type image --format "{{$1}}" "llm-harness:$target"; }
[ "$(configured .OCIv1.Config.User)" = 1000:1000 ]
entry=$(configured 'index .OCIv1.Config.Entrypoint 0')
read -r -d '' replay <<'END' || true
set -e
cd "$(mktemp -d)"
! touch /opt/harness/x /etc/x 2> /dev/null
python=/opt/harness/bin/python
$python -c 'import json
for k in range(40): print(json.dumps({"arrival_s": 0.05 * k, "input_tokens": 20, "output_tokens": 8}))' > trace.jsonl
$python -m harness.cluster.engines.fake.server --log truth.jsonl > ready &
trap "kill $!" EXIT
until grep -q ready ready; do kill -0 $!; sleep 0.1; done
"$1" replay trace.jsonl --base-url "$(cut -d' ' -f2 ready)" --slo ttft_p95=2s --min-requests 1
END
for user in 1000:1000 4242:0; do
  container=$(bud from "llm-harness:$target")
  bud run --user "$user" "$container" -- "$entry" --version
  bud run --user "$user" "$container" -- bash -c "$replay" bash "$entry"
  if [ "$target/$user" = cpu/1000:1000 ]; then # real vLLM on this machine's CPU
    bud run --user "$user" "$container" -- bash -c '"$0" replay /opt/harness/lib/python3*/site-packages/harness/scenarios/traces/azure-conv-2023.csv --limit 12 --concurrency 4 --min-requests 1' "$entry"
  fi
  if bud run --user 0:0 "$container" -- find / -xdev \( -name .git -o -name '.env*' -o -name .pypirc \) | grep .; then
    echo "the image has files that do not belong there" && exit 1
  fi
  bud rm "$container" > /dev/null && container=
done
echo "llm-harness:$target was built and run"
