#!/usr/bin/env bash
# Rebuild every table and figure in results/ from the run data recorded beside them (CPU, seconds), then the README's tables.
#   reproduce.sh [--check]
# --check rebuilds into a temporary folder and compares: exit code 1 where a committed table is not what the data give, a
# figure is missing, or results/ holds a table or figure that nothing here makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-${VENV:-.venv}/bin/python}
case ${1:-} in
  "" | --check) ;;
  *) sed -n '2,5s/^# //p' "$0"; exit 2 ;;
esac

rebuilt=$(mktemp -d) # laid out as results/
trap 'rm -rf "$rebuilt"' EXIT

for file in results/bench_*.json results/gpu_tests.json; do
  [[ ! -f $file ]] || cp "$file" "$rebuilt" # reports on them are written beside them
done
# One process for all: most of the time goes into imports.
MPLBACKEND=Agg PYTHONPATH=. "$python" - "$rebuilt" <<'END'
import contextlib, json, os, sys
from pathlib import Path
from scripts import study, table1
from scripts.bench import distributed_table, kernels_table, loaders_picture, loaders_table, norm_sites_table, training
from scripts.bench import training_table
from scripts.dev import gpu_tests
from onlinenorm.deploy.export import page

rebuilt = Path(sys.argv[1])
jobs = [(table1, [str(runs), "--output", str(rebuilt / runs.parent.name)]) for runs in sorted(Path("results").glob("*/runs"))]
if Path("results/study").is_dir():
    jobs.append((study, ["results/study", "--output", str(rebuilt / "study")]))
jobs.append((training_table, [str(rebuilt / "bench_training.json")]))
recorded = {"data": loaders_table, "distributed": distributed_table, "kernels": kernels_table, "normalizer": norm_sites_table}
for name, table in recorded.items():
    if (data := rebuilt / f"bench_{name}.json").exists():
        jobs.append((table, [str(data)]))
for module, arguments in jobs:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if code := module.main(arguments):
            sys.exit(code)
loaders_picture.draw(rebuilt / "bench_data.json")
for file in Path("results/exports").glob("*/exports.json"):
    copy = rebuilt / file.relative_to("results").with_suffix(".md")
    copy.parent.mkdir(parents=True)
    copy.write_text(page(json.loads(file.read_text())))
steps = json.loads((rebuilt / "bench_training.json").read_text())
training.plot(steps, str(rebuilt / "bench_training.png"))
if (tests := rebuilt / "gpu_tests.json").exists():
    tests.with_suffix(".md").write_text(gpu_tests.render(json.loads(tests.read_text())))
END
rm -f "$rebuilt"/*.json

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

"$python" scripts/dev/readme.py ${1:+"$1"} || status=1
exit $status
