#!/usr/bin/env bash
# Rebuild every table and figure in results/ from the run data recorded beside them (CPU, seconds), then the README's tables.
#   reproduce_results.sh [--check]
# --check rebuilds into a temporary folder and compares: exit code 1 where a committed table is not what the data give.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-${VENV:-.venv}/bin/python}
case ${1:-} in
  "" | --check) ;;
  *) sed -n '2,4s/^# //p' "$0"; exit 2 ;;
esac

rebuilt=$(mktemp -d)
trap 'rm -rf "$rebuilt"' EXIT

for runs in results/*/runs; do
  study=${runs%/runs}
  if [[ ${1:-} == --check ]]; then
    "$python" scripts/table1.py "$runs" --output "$rebuilt" >/dev/null
    for file in table1.md table1.json; do diff "$study/$file" "$rebuilt/$file"; done
    [[ -s $study/curves.png ]] || { echo "$study/curves.png is missing" >&2; exit 1; }
    echo "$study: as recorded"
  else
    "$python" scripts/table1.py "$runs" --output "$study" >/dev/null
    echo "$study: rebuilt"
  fi
done
"$python" scripts/bench_report.py results/bench_training.json --output "$rebuilt/bench_training.md"
if [[ ${1:-} == --check ]]; then
  diff results/bench_training.md "$rebuilt/bench_training.md"
else
  cp "$rebuilt/bench_training.md" results/
fi
"$python" scripts/readme.py ${1:+"$1"}
