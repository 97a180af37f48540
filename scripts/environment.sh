#!/usr/bin/env bash
# Make the virtual environment and install the project into it; sourced by quickstart.sh and test.sh, run by the Dockerfile.
#   environment.sh [EXTRA]     all that the scripts need, and the optional dependencies EXTRA, e.g. test
# VENV names another folder than .venv. A second call returns at once unless pyproject.toml or constraints.txt changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
extra=${1:-}
stamp=$VENV/.installed${extra:+-$extra}
fingerprint=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)

stamps=("$stamp")
[[ -n $extra ]] || stamps+=("$VENV"/.installed-*) # an installation with an extra serves calls without one

if ! grep -qsx "$fingerprint" "${stamps[@]}"; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or newer is needed; $("$python" --version) was found. Set PYTHON to another interpreter." >&2; exit 1; }
  echo "Installing into $VENV (torch with CUDA libraries: several GB, minutes) ..."
  [[ -x $VENV/bin/python ]] || "$python" -m venv "$VENV"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,report,deploy${extra:+,$extra}]"
  echo "$fingerprint" >"$stamp"
fi
