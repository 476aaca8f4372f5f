#!/usr/bin/env bash
# Installs moe-lm with its development tools into .venv, then checks style, types, the house's contract, and runs the
# tests, all but the slow ones. Arguments go to pytest: `bash launch/test.sh -m slow`, `bash launch/test.sh -k router`.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh dev
bin=.venv/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports" --no-logo
"$bin/python" -m pytest -m "not slow" "$@"
