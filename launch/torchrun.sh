#!/usr/bin/env bash
# Trains, or prepares data, on one machine, or on several when the same line is run on each of them:
#
#   MASTER_ADDR=node-a NNODES=2 bash launch/torchrun.sh CONFIG [key=value ...]
#
#   VERB           what is run; default pretrain, else finetune, prepare or "data verify"
#   NNODES         machines; default 1; or MIN:MAX, to go on with fewer where some do not come back
#   NPROC          processes on this machine; default: one a GPU, without GPUs one a core
#   MASTER_ADDR    where several machines meet: the name or address of one of them
#   MASTER_PORT    default 29400
#   JOB_ID         tells jobs that share a master apart; default moe-lm
#   MAX_RESTARTS   how often a failed process is started again, with all others, before a later step is saved; default 3
# When a process fails, all are started again and go on from the last checkpoint. When a machine is lost, the others wait
# up to 10 minutes for this line to be run on it, or on one in its place; with NNODES=MIN:MAX they go on without it after
# some 45 s, and with it when it comes back. train.global_batch_size must be a multiple of the processes that are left, and
# expert_parallel_size a divisor. The machine at MASTER_ADDR, where all meet, cannot be spared.
# SIGTERM, Ctrl-C, SIGUSR1 and a closed terminal end the training on all machines, with a checkpoint and exit code 75; a
# second one ends it at once here. Exit codes: moe_lm/common/exits.py.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"

stop() { echo "error: $1" >&2; exit 2; }
[ $# -gt 0 ] || stop "no config named; run: bash launch/torchrun.sh CONFIG [key=value ...]"
nodes=${NNODES:-1} meeting=localhost:0 # alone: any free port
if [ "$nodes" != 1 ]; then
    [ -n "${MASTER_ADDR:-}" ] || stop "NNODES=$nodes needs MASTER_ADDR, the machine where all meet"
    meeting=$MASTER_ADDR:${MASTER_PORT:-29400}
fi
command -v moe-lm >/dev/null || stop "moe-lm is not installed; run: bash launch/setup.sh"

again=
for name in VERB NNODES NPROC MASTER_ADDR MASTER_PORT JOB_ID MAX_RESTARTS; do
    [ -z "${!name:-}" ] || again+="$name=$(printf %q "${!name}") "
done
export MOE_LM_COMMAND="${again}bash $(printf '%q ' "$0" "$@")"

read -ra verb <<<"${VERB:-pretrain}"
exec python -m moe_lm.parallel.torchrun --nnodes "$nodes" --nproc-per-node "${NPROC:-auto}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$meeting" --rdzv-id "${JOB_ID:-moe-lm}" \
    --module moe_lm "${verb[@]}" "$@"
