#!/usr/bin/env bash
# Train on several machines: run the same command on each of them, in any order.
#
#   NNODES=4 RDZV_ENDPOINT=node0:29400 launch/many_nodes.sh --config megatron_configs/qwen2_72b.yaml
#
# All arguments are those of engine/pretrain.py; files they name are on storage that all nodes see.
# Settings, as environment variables:
#   NNODES              number of machines (needed)
#   RDZV_ENDPOINT       host:port of one of them, which the others can reach (needed, the same on all)
#   RDZV_ID             name of the job, where several meet at one endpoint (default: retemper)
#   RDZV_TIMEOUT        seconds to wait for the last machine (default: 900)
#   LOCAL_ADDR          address of this machine, where its host name is not what the others know it by
#   NPROC_PER_NODE      ranks on a machine: a number, gpu or cpu (default: gpu)
#   MAX_RESTARTS        how often to start all ranks again after a failure, from the newest checkpoint (default: 0)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds for a checkpoint when the run is asked to stop (default here: 300)
#   PYTHON              the interpreter that has retemper (default: python)
# Read by the libraries below, and to be set where a machine has several networks:
#   NCCL_SOCKET_IFNAME  interface over which GPUs find each other, as "eth0" or "^lo,docker0"
#   GLOO_SOCKET_IFNAME  interface of the control messages, and of all messages between CPUs, as "eth0"
#   NCCL_IB_HCA         InfiniBand adapters to use, as "mlx5"; NCCL_IB_DISABLE=1 for none
#   NCCL_DEBUG          WARN or INFO where GPUs do not find each other
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

[[ ${NNODES:-} =~ ^[1-9][0-9]*$ ]] || fail "NNODES='${NNODES:-}': set it to the number of machines, as in NNODES=4"
[[ ${RDZV_ENDPOINT:-} == *:* ]] ||
  fail "RDZV_ENDPOINT='${RDZV_ENDPOINT:-}': set it to host:port of one of the machines, as in node0:29400"
# Of a store that has gone torchrun would print pages of stack frames, between the lines that say why.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
root=$(dirname "$(dirname "$(realpath "$0")")")
# A copy of this script in another folder runs the installed package.
[[ -f $root/engine/pretrain.py ]] || root=$("${PYTHON:-python}" -c 'import retemper; print(retemper.__path__[0])')
exec "${PYTHON:-python}" "$root/launch/quiet_torchrun.py" \
  --nnodes "$NNODES" --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-0}" \
  --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-retemper}" \
  --rdzv-conf "join_timeout=${RDZV_TIMEOUT:-900}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  "$root/engine/pretrain.py" "$@"
