#!/usr/bin/env bash
# Train on this machine, a rank for each GPU.
#
#   launch/one_node.sh --config megatron_configs/qwen2.5_0.5b.yaml
#
# All arguments are those of engine/pretrain.py. Settings, as environment variables:
#   NPROC_PER_NODE    ranks: a number, gpu or cpu (default: gpu, one for each; without a GPU one for each core)
#   MAX_RESTARTS      how often to start all ranks again after a failure, from the newest checkpoint (default: 0)
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds for a checkpoint when the run is asked to stop (default here: 300)
#   PYTHON            the interpreter that has retemper (default: python)
#   OMP_NUM_THREADS   CPU threads of a rank (default of torchrun: 1 where there are several ranks)
#   NCCL_DEBUG        WARN or INFO where GPUs do not find each other
set -euo pipefail

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
root=$(dirname "$(dirname "$(realpath "$0")")")
# A copy of this script in another folder runs the installed package.
[[ -f $root/engine/pretrain.py ]] || root=$("${PYTHON:-python}" -c 'import retemper; print(retemper.__path__[0])')
exec "${PYTHON:-python}" "$root/launch/quiet_torchrun.py" --standalone \
  --nproc-per-node "${NPROC_PER_NODE:-gpu}" --max-restarts "${MAX_RESTARTS:-0}" \
  "$root/engine/pretrain.py" "$@"
