#!/usr/bin/env bash
# The tests at both ends of the supported range, each in a virtual environment of its own under .venv-matrix/.
# Not part of every CI run: where no CPU build of torch lies at hand, each end downloads gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

try() {
    name=$1
    shift
    "$python" -m venv ".venv-matrix/$name"
    ".venv-matrix/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -e ".[dev]"
    ".venv-matrix/$name/bin/python" -m pip list --format=freeze | grep -E '^(torch|triton|transformers|peft|flwr|numpy)=='
    ".venv-matrix/$name/bin/python" -m pytest -q -p no:cacheprovider
    TRITON_INTERPRET=1 ".venv-matrix/$name/bin/python" -m pytest -q -p no:cacheprovider \
        tests/flex_kernels/test_{experts,route,graft_logits,grafted_route,combine,score}.py
}

try oldest "torch==2.11.0" "triton==3.6.0" "transformers==5.17.0" "setuptools>=77,<82"
try newest --upgrade torch triton transformers peft flwr
