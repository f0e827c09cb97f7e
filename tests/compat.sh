#!/usr/bin/env bash
# Builds with the oldest supported torch, and runs the ops on the CPU: that build in that torch, the newest torch's build in it, and
# that build in the newest torch. Needs the newest torch's build in the source folder.
#   tests/compat.sh FOLDER_OF_THE_NEWEST_PYTHON PYTHON [rehearsal]
# PYTHON may be a name like python3.12 that only pyenv knows. With `rehearsal` it rehearses `make gpu` there, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
newest=$PWD/$1
python=$2
"$python" -c "" 2>/dev/null || python=$(ls "$(pyenv root)/versions/${2#python}".*/bin/python | tail -n 1)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=$PWD/.venv-compat-$version
copy=build/compat-$version

if [ ! -e "$venv/ready" ] || [ requirements/compat.txt -nt "$venv/ready" ]; then
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q -r requirements/compat.txt -c requirements/compat-constraints.txt
  touch "$venv/ready"
fi

if [ "${3:-}" = rehearsal ]; then
  EFFDET_FAST_REHEARSAL_PYTHON=$venv/bin/python exec "$newest/python" -m pytest -q tests/benchmarks/test_gpu_rehearsal.py
fi

rm -rf "$copy"
mkdir -p "$copy"
cp -r benchmarks csrc effdet_fast tests LICENSE MANIFEST.in README.md pyproject.toml setup.py "$copy"
rm -f "$copy"/effdet_fast/*.so

say() { echo "== $*"; }
doctor() { (cd "$copy" && "$1/python" -m effdet_fast doctor); }
run_ops() {
  doctor "$venv/bin"
  (cd "$copy" && OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n auto -m "not slow and not cuda" -k "not emulated" tests/ops)
}

say "torch 2.11 builds, under CPython $version"
(cd "$copy" && "$venv/bin/pip" install -q --no-build-isolation --no-deps -e .)
run_ops
say "its build in the newest torch"
doctor "$newest"
say "the newest torch's build in torch 2.11"
cp effdet_fast/kernels_*.so "$copy/effdet_fast/"
run_ops
