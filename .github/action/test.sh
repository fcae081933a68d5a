#!/usr/bin/env bash
# What action.yml runs: repeats of one replay and, where there is a baseline, the comparison. Inputs come as variables
# and reach the command line as one argument each: nothing in them is run by the shell.
set -uo pipefail

fail() { echo "::error::$1"; exit 2; }
lines() { grep -v '^[[:space:]]*$' <<<"$1" | sed 's/^[[:space:]]*//; s/[[:space:]]*$//' || true; }
# The worst of two exit statuses: a failure, INVALID, missed, not decided, 0.
worse() { for s in 1 2 3 4 5; do if [[ $1 == "$s" || $2 == "$s" ]]; then echo "$s"; return; fi; done; echo $(($1 > $2 ? $1 : $2)); }

runs=$INPUT_RUNS junit=$INPUT_RUNS/junit summary=${GITHUB_STEP_SUMMARY:-/dev/null}
[[ $INPUT_REPEATS =~ ^[1-9][0-9]?$ ]] || fail "repeats: '$INPUT_REPEATS' is not a number from 1 to 99"
[[ -z $INPUT_FAIL_IF || -n $INPUT_BASELINE ]] || fail "fail-if compares with a baseline: give one, or an slo instead"
[[ -z $(ls -A "$runs" 2>/dev/null) ]] || fail "runs: $runs is not empty, and its runs would count as these"
compared=$INPUT_BASELINE
[[ -z $compared || $compared == s3://* || -n $(ls -A "$compared" 2>/dev/null) ]] || compared=
mkdir -p "$junit" || fail "runs: cannot make $runs"
{ echo "runs=$runs"; echo "junit=$junit"; } >>"${GITHUB_OUTPUT:-/dev/null}"

options=(--base-url "$INPUT_BASE_URL" --format md -o "$runs")
[[ -n $INPUT_MODEL ]] && options+=(--model "$INPUT_MODEL")
[[ -n $INPUT_SLO ]] && options+=(--slo "$INPUT_SLO")
mapfile -t more < <(lines "$INPUT_OPTIONS")
status=0 reports=$(mktemp)
for ((seed = 1; seed <= INPUT_REPEATS; seed++)); do
  echo "::group::replay, seed $seed"
  said=$(harness replay "$INPUT_TRACE" "${options[@]}" "${more[@]}" --seed "$seed" --junit "$junit/replay-$seed.xml")
  code=$?
  echo "$said"
  echo "::endgroup::"
  printf '\n<details><summary>Run of seed %s: exit status %s</summary>\n\n%s\n</details>\n' "$seed" "$code" "$said" >>"$reports"
  status=$(worse "$status" "$code")
  ((code != 1 && code != 2 && code <= 5)) || break
done

if ((status == 1 || status == 2 || status > 5)); then
  echo "::error::harness replay failed; its words are in the log"
elif [[ -n $INPUT_BASELINE && -z $compared ]]; then
  echo "::warning::no baseline at $INPUT_BASELINE yet, so nothing is compared: keep $runs as the first"
elif [[ -n $compared ]]; then
  conditions=()
  while IFS= read -r line; do conditions+=(--fail-if "$line"); done < <(lines "$INPUT_FAIL_IF")
  said=$(harness compare "$compared" "$runs" "${conditions[@]}" --format md --junit "$junit/compare.xml")
  code=$?
  echo "$said"
  printf '# Against the baseline\n\n%s\n' "$said" >>"$summary"
  ((code != 4)) || echo "::error::a condition of fail-if fails: the whole interval lies beyond its bound"
  status=$(worse "$status" "$code")
fi
cat "$reports" >>"$summary"
echo "status=$status" >>"${GITHUB_OUTPUT:-/dev/null}"
exit "$status"
