#!/bin/sh
# From a trace to a price list and a fleet, on hardware that nobody rented: every figure is simulated, and says so.
#
#   sh capacity_to_price.sh trace.jsonl mistral-7b-instruct-v0.3 aws-g6e.xlarge
#
# To measure instead, leave out --engine and --clock and give --base-url, or a machine that has the tier's hardware.
set -eu
trace=$1 model=$2 tier=$3
slo=ttft_p95=1s,tpot_p95=50ms
out=$(mktemp -d ./capacity-XXXXXX)

harness capacity "$trace" --engine simulated --clock virtual --model "$model" --tier "$tier" --slo "$slo" --out "$out" --quiet
harness price "$out"/*-capacity-* --margin 40% --utilisation 30% --html "$out/price.html" --format csv > "$out/price.csv"
harness plan-fleet "$trace" "$out"/*-capacity-* --grow 3x --availability 99.9% --html "$out/fleet.html"
echo "pages and tables: $out"
