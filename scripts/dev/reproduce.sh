#!/usr/bin/env bash
# Rebuild every table and figure in results/ from the run data recorded beside them (CPU, seconds), then the page of
# configs/ from its files, and README.md.
#   reproduce.sh [--check]
# --check rebuilds into a temporary folder and compares: exit code 1 where a committed table is not what the data give, a
# figure is missing, or results/ holds a table or figure that nothing here makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-${VENV:-.venv}/bin/python}
case ${1:-} in
  "" | --check) ;;
  *) sed -n '2,6s/^# //p' "$0"; exit 2 ;;
esac

rebuilt=$(mktemp -d) # laid out as results/
trap 'rm -rf "$rebuilt"' EXIT

"$python" scripts/dev/rebuild.py "$rebuilt"

status=0
fail() { echo "$*" >&2; status=1; }
while read -r file; do
  if [[ ${1:-} != --check ]]; then
    mkdir -p "$(dirname "results/$file")"
    cp "$rebuilt/$file" "results/$file"
    echo "results/$file: rebuilt"
  elif [[ $file == *.html ]]; then
    continue # not recorded: it repeats the others
  elif [[ ! -s results/$file ]]; then
    fail "results/$file: missing"
  elif [[ $file == *.png ]]; then
    echo "results/$file: there, and can be drawn again"
  elif diff "results/$file" "$rebuilt/$file"; then
    echo "results/$file: as recorded"
  else
    fail "results/$file: not what the recorded data give"
  fi
done < <(cd "$rebuilt" && find . -type f -printf '%P\n' | sort)

# What remains is either data as a measurement left it or nothing that can be trusted.
while read -r file; do
  [[ ! -e $rebuilt/$file ]] || continue
  case $file in
    *.md | *.png | study/*.json | */table1.json) fail "results/$file: nothing here makes it" ;;
    *) echo "results/$file: recorded data" ;;
  esac
done < <(cd results && find . -type f -not -path '*/runs/*' -not -name '*.html' -printf '%P\n' | sort)

"$python" scripts/dev/config_page.py ${1:+"$1"} || status=1
"$python" scripts/dev/readme.py ${1:+"$1"} || status=1
exit $status
