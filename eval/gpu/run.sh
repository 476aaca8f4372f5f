#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: `bash eval/gpu/run.sh [--minutes 10] [--out DIR]`.
# PYTHON names the interpreter; by default it is the one of .venv. `--tiny` tries the parts with small shapes on any machine.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-.venv/bin/python}" eval/gpu/day.py "$@"
