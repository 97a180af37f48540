#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: GPU tests, then both benchmarks. Results land in $OUT (default results/).
# Usage: scripts/gpu_check.sh [quick]     quick: the two rows that decide, about five minutes
set -uo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-results}"
python="${PYTHON:-python3}"
export PYTHONPATH=. PYTHONUNBUFFERED=1
deciding=(--mode compile+graph --dtype bf16 --normalizer batch online_clamp --rounds 2 --repeats 10)
[ "${1:-}" = quick ] || deciding=()
timeout "${TRAINING_SECONDS:-3600}" "$python" scripts/bench_training.py "${deciding[@]}" \
    --output "$out/bench_training.json" 2>&1 | tee "$out/bench_training.log"
trained=$?
# Warnings stay warnings: a GPU machine may hold another torch than the pinned one.
timeout "${TEST_SECONDS:-1200}" "$python" -m pytest tests/ops/test_fused.py tests/ops/test_fused_single_read.py tests/ops/test_fused_training.py \
    -p no:cacheprovider --noconftest -o filterwarnings=default --durations=5 2>&1 | tee "$out/kernels_tests.log"
tested=$?
timeout "${SITES_SECONDS:-1200}" "$python" scripts/bench_normalizer.py \
    --output "$out/bench_normalizer.json" 2>&1 | tee "$out/bench_normalizer.log"
measured=$?
echo "training $trained, tests $tested, sites $measured"
exit $((trained || tested || measured))
