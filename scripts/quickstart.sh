#!/usr/bin/env bash
# Table 1 on the embedded images: three normalizers, the table and the curves, from a bare machine.
#   quickstart.sh [--fresh] [OVERRIDE...]
# --fresh starts over; without it finished runs are kept and unfinished ones continued. Overrides go to train.py
# (seed=1, recipe.epochs=4, ...). Results lie in runs/quickstart.
# Exit code 0: all three have run and the table is written; 1 or 2: a run failed, or runs of other settings lie there
# (told before anything trains), which --fresh removes; 128 + signal: stopped, the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides=()
for word in "$@"; do
  case $word in
    --fresh) rm -rf runs/quickstart ;;
    -h | --help) sed -n '2,7s/^# //p' "$0"; exit ;;
    *) overrides+=("$word") ;;
  esac
done
former=$(find runs/quickstart -name config.yaml 2>/dev/null || true)
source scripts/environment.sh ""
if [ -n "$former" ] && ! "$VENV/bin/python" scripts/table1.py runs/quickstart --before experiment=quickstart "${overrides[@]}"; then
  echo "Nothing was trained. Move those runs out of runs/quickstart, or start over with --fresh, which deletes all there." >&2
  exit 1
fi

# Side by side with their share of the cores: small networks gain little from threads of their own.
threads=$(($(nproc) / 3))
export OMP_NUM_THREADS=$((threads > 1 ? threads : 1))
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait' INT TERM # each run saves where it is
for normalizer in online_clamp online_layer_scaling batch; do
  "$VENV/bin/python" train.py experiment=quickstart normalizer=$normalizer "${overrides[@]}" > >(sed -u "s/^/$normalizer: /") 2>&1 &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
if ((status >= 128)); then
  echo "A run was stopped; the same command continues it." >&2
  exit "$status"
fi
if ((status == 0)); then "$VENV/bin/python" scripts/table1.py runs/quickstart || status=$?; fi
((status == 0)) || [ -z "$former" ] || echo "If runs of other settings are in the way: --fresh starts over." >&2
exit "$status"
