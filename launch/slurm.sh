#!/usr/bin/env bash
# Train on many nodes under Slurm: srun starts one torchrun on each node, torchrun a rank for each GPU.
#
#   sbatch --nodes=4 --partition=gpu --time=2-00:00:00 launch/slurm.sh --config megatron_configs/qwen2_72b.yaml
#
# All arguments are those of engine/pretrain.py. Submit it in the folder to which the paths are relative, on storage that
# all nodes see. Slurm's options are given to sbatch, where they override those below. A job that is preempted or whose
# node fails is queued again by Slurm; one that comes to its time limit saves, and queues itself again. Either way it
# goes on from its newest checkpoint (resume: auto).
#
# Settings, as environment variables:
#   RETEMPER_ROOT       the repository (default: the folder in which sbatch was called, else the installed package)
#   PYTHON              the interpreter that has retemper, the same path on all nodes (default: python)
#   NPROC_PER_NODE      ranks on a node: a number, gpu or cpu (default: gpu)
#   RDZV_PORT           port of the rendezvous on the job's first node (default: one that follows from the job's number)
#   MAX_RESTARTS        how often torchrun starts all ranks again before the job fails (default: 0)
#   MAX_REQUEUES        how often the job queues itself again at its time limit (default: 100)
# Read by the libraries below, and to be set where a node has several networks:
#   NCCL_SOCKET_IFNAME  interface over which GPUs find each other, as "eth0" or "^lo,docker0"
#   GLOO_SOCKET_IFNAME  interface of the control messages, as "eth0"
#   NCCL_IB_HCA         InfiniBand adapters to use, as "mlx5"; NCCL_IB_DISABLE=1 for none
#   NCCL_DEBUG          WARN or INFO where GPUs do not find each other
#
#SBATCH --job-name=retemper
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# To this script alone (B:), which passes it on: 10 minutes for a checkpoint before the time is up.
#SBATCH --signal=B:USR1@600
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a job for Slurm: sbatch --nodes=4 $0 --config run.yaml"
# Slurm runs a copy of this file, which does not know where the repository is.
export RETEMPER_ROOT=${RETEMPER_ROOT:-$SLURM_SUBMIT_DIR}
if [[ ! -f $RETEMPER_ROOT/launch/many_nodes.sh ]]; then
  installed=$("${PYTHON:-python}" -c 'import retemper; print(retemper.__path__[0])' 2> /dev/null) || installed=
  RETEMPER_ROOT=${installed:-$RETEMPER_ROOT}
fi
[[ -f $RETEMPER_ROOT/launch/many_nodes.sh ]] ||
  fail "RETEMPER_ROOT='$RETEMPER_ROOT': launch/many_nodes.sh is not in it; set it to the repository"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_JOB_NUM_NODES
export RDZV_ENDPOINT=${hosts%%$'\n'*}:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# A job that was queued again must not meet what is left of its former attempt.
export RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

asked_to_stop=0
# shellcheck disable=SC2329  # called by the traps below
stop() { # the ranks save and end: srun and torchrun pass the signal on to them
  asked_to_stop=$1
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}
trap 'stop time' USR1
trap 'stop preemption' TERM

# In the background, since bash runs traps only between commands or while it waits.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 "$RETEMPER_ROOT/launch/many_nodes.sh" "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2> /dev/null; do # a trap has ended the wait, the run is still saving
  status=0
  wait $! || status=$?
done

if [[ $asked_to_stop == time && ${SLURM_RESTART_COUNT:-0} -lt ${MAX_REQUEUES:-100} ]]; then
  echo "the time is up: job $SLURM_JOB_ID queues itself again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
