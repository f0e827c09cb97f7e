#!/usr/bin/env bash
# Installs a wheel with what it depends on into a new environment, and tries it there: doctor, an op's gradient, a training step.
#   tests/wheel.sh WHEEL PYTHON [REQUIREMENT ...]
#   tests/wheel.sh dist/effdet_fast-0.1.0-py3-none-any.whl python3.12 torch==2.11.0
# PYTHON may be a name like python3.12 that only pyenv knows.
set -euo pipefail
wheel=$(realpath "$1")
trial=$(realpath "$(dirname "$0")/wheel_trial.py")
python=$2
"$python" -c "" 2>/dev/null || python=$(ls "$(pyenv root)/versions/${2#python}".*/bin/python | tail -n 1)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cd "$folder" # where no source folder hides the installed package
"$python" -m venv venv
venv/bin/pip install -q "$wheel" "${@:3}"
echo "== $(basename "$wheel") under $(venv/bin/python --version)"
# Without kernels doctor fails, as it says in its report; the trial decides what that means.
venv/bin/effdet-fast doctor || true
venv/bin/python "$trial"
