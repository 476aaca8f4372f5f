#!/usr/bin/env bash
# Trains, or prepares data, on every machine of a hostfile, started from one of them, over pdsh and ssh:
#
#   bash launch/deepspeed.sh CONFIG [key=value ...]
#
# Needs: ssh without a password to each host; this folder, CONFIG and run_dir under the same paths on all of them.
#   VERB           what is run; default pretrain, else finetune, prepare or "data verify"
#   HOSTFILE       lines `host slots=processes`; default launch/hostfile (an example: launch/hostfile.example)
#   MASTER_ADDR    address of the first host; default: the first that `hostname -I` names there
#   MASTER_PORT    default 29500
# ssh carries over only variables that begin with PYTHON or NCCL; others (GLOO_SOCKET_IFNAME) are lines `NAME=value` of
# ./.deepspeed_env or ~/.deepspeed_env. What ranks set themselves: moe-lm doctor.
# SIGTERM, Ctrl-C, SIGUSR1 and a closed terminal end the training on all hosts, with a checkpoint and exit code 75; a second
# one gives it 30 s more. Exit codes: moe_lm/common/exits.py. It restarts nothing: after a failure run the same line again,
# and it goes on from the last checkpoint.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
hostfile=${HOSTFILE:-$root/launch/hostfile}
export PATH="$root/.venv/bin:$PATH"

stop() { echo "error: $1" >&2; exit 2; }
[ $# -gt 0 ] || stop "no config named; run: bash launch/deepspeed.sh CONFIG [key=value ...]"
command -v ssh >/dev/null || stop "ssh is not installed; run: apt-get install openssh-client"
command -v pdsh >/dev/null || stop "pdsh is not installed; run: apt-get install pdsh"
command -v deepspeed >/dev/null || stop "moe-lm is not installed; run: bash launch/setup.sh"
[ -f "$hostfile" ] || stop "there is no hostfile $hostfile; copy launch/hostfile.example there, or set HOSTFILE"

again=
for name in VERB HOSTFILE MASTER_ADDR MASTER_PORT; do
    [ -z "${!name:-}" ] || again+="$name=$(printf %q "${!name}") "
done
export MOE_LM_COMMAND="${again}bash $(printf '%q ' "$0" "$@")"

read -ra verb <<<"${VERB:-pretrain}"
exec python -m moe_lm.parallel.pdsh "$hostfile" \
    --master_addr "${MASTER_ADDR:-}" --master_port "${MASTER_PORT:-29500}" \
    --module moe_lm "${verb[@]}" "$@"
