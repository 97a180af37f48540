#!/usr/bin/env bash
# Table 1 on the embedded images: three normalizers, the table and the curves, from a bare machine.
#   quickstart.sh [--fresh] [OVERRIDE...]
# --fresh starts over; without it finished runs are kept and unfinished ones continued. Overrides go to train.py
# (seed=1, recipe.epochs=3, ...). Results lie in runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
  --fresh) rm -rf runs/quickstart; shift ;;
  -h | --help) sed -n '2,5s/^# //p' "$0"; exit ;;
esac
source scripts/environment.sh ""

for normalizer in online_clamp online_layer_scaling batch; do
  "$VENV/bin/python" train.py experiment=quickstart normalizer=$normalizer "$@"
done
"$VENV/bin/python" scripts/table1.py runs/quickstart
