#!/usr/bin/env bash
# Makes .venv beside this folder and installs moe-lm into it: `bash launch/setup.sh [EXTRA]`.
# Quick when nothing changed. PYTHON names the interpreter to use.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extra=${1:-}
venv=$root/.venv
stamp=$venv/.installed${extra:+-$extra}
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"

if "$venv/bin/python" -c "" 2>/dev/null && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }

python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: ${PYTHON:-python3} is not Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python3 bash $0" >&2
    exit 2
fi

if ! { new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    "$python" -m venv --clear "$venv"
fi

quiet=--quiet
[ -t 1 ] && quiet=
echo "Installing moe-lm into .venv (several minutes the first time)"
# Modules are compiled when they are first imported, which most never are: compiling all would take most of a minute.
"$venv/bin/python" -m pip install $quiet --disable-pip-version-check --no-compile \
    --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
echo "$wanted" | tee "$venv/.installed" >"$stamp"
