#!/usr/bin/env bash
# The suite against an installed wheel: built here, installed into an empty virtual environment, and no source beside
# the tests. Left out: the tests that read the source itself or build it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip wheel . --quiet --disable-pip-version-check --no-deps --wheel-dir "$work"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$(echo "$work"/*.whl)[dev]"

mkdir "$work/beside"
cp -r tests examples benchmarks configs tools pyproject.toml "$work/beside"
cd "$work/beside"
rm -r tests/csrc tests/test_{docs,house}.py tests/benchmarks/test_{aot,bench_gpu}.py
"$work/venv/bin/python" -c 'import flex, flex_kernels; print(flex.__path__[0], flex_kernels.__file__)'
"$work/venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
