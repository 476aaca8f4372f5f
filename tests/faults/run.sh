#!/usr/bin/env bash
# Try the 35 faults on the real program, a line a row. `run.sh --short` leaves the long rows out, as CI does.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
marks="slow or not slow"
if [ "${1:-}" = --short ]; then
    marks="not slow"
    shift
fi
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD"
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m pytest tests/faults -q --no-header -p tests.faults.lines --tb=short -m "$marks" "$@"
