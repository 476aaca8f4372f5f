#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: `bash eval/gpu/run.sh [--minutes 10] [--out DIR]`.
# PYTHON names the interpreter; by default it is the one of .venv. `--tiny` tries the parts with small shapes on any machine.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" > /dev/null; then
    echo "error: there is no $python; run bash launch/setup.sh, or set PYTHON to an interpreter that has moe-lm" >&2
    exit 2
fi
exec "$python" eval/gpu/day.py "$@"
