#!/usr/bin/env bash
# All checks that people and CI run: lint, format, types, and the CPU test suite.
#   test.sh [PYTEST ARGUMENT...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh test

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# One thread a worker: two workers share two cores. The GPU kernels run in Triton's interpreter.
export OMP_NUM_THREADS=1 TRITON_INTERPRET=1
exec "$VENV/bin/python" -m pytest -n 2 --dist worksteal -m "not gpu and not slow" "$@"
