#!/usr/bin/env bash
# Trains on every machine of a hostfile, started from one of them, over pdsh and ssh:
#
#   bash launch/deepspeed.sh CONFIG [key=value ...]
#
# Needs: ssh without a password to each host; this folder, CONFIG and run_dir under the same paths on all of them.
#   VERB           what is run; default pretrain, else finetune
#   HOSTFILE       lines `host slots=processes`; default launch/hostfile (an example: launch/hostfile.example)
#   MASTER_ADDR    address of the first host; default: the first that `hostname -I` names there
#   MASTER_PORT    default 29500
# ssh carries over only variables that begin with PYTHON or NCCL; others (GLOO_SOCKET_IFNAME, OMP_NUM_THREADS) are
# lines `NAME=value` of ./.deepspeed_env or ~/.deepspeed_env.
# Ctrl-C and SIGTERM reach every rank, which saves a checkpoint; DeepSpeed kills it 30 s later, so let checkpoint.every be
# short where a save takes longer, and its launcher ends before the ranks do: wait for them before the next start. It
# restarts nothing: after a failure run the same line again, and it goes on from the last checkpoint.
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

# --force_multi: a hostfile with one host means that host, not this one.
# --no_local_rank: the rank is in the environment.
exec deepspeed --log_level warning --force_multi --hostfile "$hostfile" \
    --master_addr "${MASTER_ADDR:-}" --master_port "${MASTER_PORT:-29500}" \
    --no_local_rank --module moe_lm "${VERB:-pretrain}" "$@"
