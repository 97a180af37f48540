#!/usr/bin/env bash
# Table 1 on the embedded images: three normalizers, the table and the curves, from a bare machine.
#   quickstart.sh [--fresh] [OVERRIDE...]
# --fresh starts over; without it finished runs are kept and unfinished ones continued. Overrides go to train.py
# (seed=1, recipe.epochs=4, ...). Results lie in runs/quickstart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
  --fresh) rm -rf runs/quickstart; shift ;;
  -h | --help) sed -n '2,5s/^# //p' "$0"; exit ;;
esac
source scripts/environment.sh ""

# Side by side with their share of the cores: small networks gain little from threads of their own.
threads=$(($(nproc) / 3))
export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait' INT TERM # each run saves where it is
for normalizer in online_clamp online_layer_scaling batch; do
  "$VENV/bin/python" train.py experiment=quickstart normalizer=$normalizer "$@" > >(sed -u "s/^/$normalizer: /") 2>&1 &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
((status < 128)) || echo "A run was stopped; the same command continues it." >&2
((status == 0)) || exit "$status"

"$VENV/bin/python" scripts/table1.py runs/quickstart
