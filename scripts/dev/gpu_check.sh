#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: tests, then norm sites and training steps; recorded in results/, or in $OUT.
#   gpu_check.sh [quick]     quick: of the training steps the rows that decide; some ten minutes in all
# What is stopped early leaves what it has measured. Tests that fail do not stop the rest; the exit code tells.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-results}
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
rows=(--backend fused torch)
[[ ${1:-} != quick ]] || rows=(--mode compile+graph --normalizer batch online_clamp online_layer_scaling)

"$python" scripts/dev/gpu_tests.py --output "$out/gpu_tests.json"
tested=$?
"$python" scripts/bench/norm_sites.py --output "$out/bench_normalizer.json"
sites=$?
"$python" scripts/bench/training.py "${rows[@]}" --repeats 10 --output "$out/bench_training.json"
steps=$?
echo "tests $tested, sites $sites, training steps $steps"
exit $((tested || sites || steps))
