#!/usr/bin/env bash
# The whole walk on this machine: installs moe-lm into .venv, then runs `moe-lm quickstart` with the given options.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
exec "$root/.venv/bin/moe-lm" quickstart "$@"
