#!/usr/bin/env bash
# Installs moe-lm with its development tools into .venv, then checks style, types, the house's contract, and runs the
# tests, all but the slow ones, two files at a time. Arguments go to pytest: `bash launch/test.sh -m slow`,
# `bash launch/test.sh -k router`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
bin=.venv/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports" --no-logo
# Most tests wait for processes that they start: two workers with a thread each take half the time of one with two.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
