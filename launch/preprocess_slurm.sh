#!/usr/bin/env bash
# Preprocess a corpus on many nodes: a Slurm array with one part of the input a task, and a job that joins the parts.
#
#   SHARDS=64 launch/preprocess_slurm.sh --input 'web/*.jsonl.zst' --tokenizer models/qwen3 --output-prefix data/web
#
# All arguments are those of tools/preprocess.py but --shard. Run it where you would run sbatch, in the folder to which
# the paths are relative, on storage that all nodes see. The same command again goes on after an interruption: parts
# that are complete are left alone, begun ones continue.
#
# Settings, as environment variables:
#   SHARDS          number of parts (needed): at least as many as nodes; more make a lost node cost less
#   SBATCH_OPTIONS  options for sbatch, separated by spaces: "--cpus-per-task=32 --partition=cpu --time=08:00:00"
#   PYTHON          the interpreter that has retemper (default: python)
#
#SBATCH --job-name=preprocess
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

# Checks the arguments before anything waits in a queue; prints whether to overwrite, and the prefix.
read_arguments() {
  "$PYTHON" - "$@" <<'END'
import os

from retemper.tools.preprocessing.dataset_files import refuse_existing_outputs
from retemper.engine.errors import UserError, run_command
from retemper.tools.preprocessing.dataset.checks import output_prefixes, require_free_shards
from retemper.tools.preprocessing.option_rules import check_options
from retemper.tools.preprocess import parse_arguments


def main():
    options = parse_arguments()
    check_options(options)
    for name in ("cache_folder", "report", "list_inputs"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: is for one call of tools/preprocess.py; leave it out")
    if options.shard is not None or "-" in options.input:
        raise UserError("--shard is set by this script, and standard input cannot be divided; leave them out")
    if "RETEMPER_STAGE" not in os.environ:
        require_free_shards(options, int(os.environ["SHARDS"]))
        for prefix in output_prefixes(options, options.output_prefix):
            refuse_existing_outputs(prefix, options.overwrite)
    print(int(options.overwrite), options.output_prefix, sep="\n")


run_command(main)
END
}

submit() {
  local array join
  export SHARDS PYTHON RETEMPER_ROOT
  # shellcheck disable=SC2086  # the options are words to be split
  array=$(RETEMPER_STAGE=part sbatch --parsable --export=ALL ${SBATCH_OPTIONS:-} --array="0-$((SHARDS - 1))" \
    "$RETEMPER_ROOT/launch/preprocess_slurm.sh" "$@")
  array=${array%%;*} # where there are several clusters, the name of one follows
  # shellcheck disable=SC2086
  join=$(RETEMPER_STAGE="join" sbatch --parsable --export=ALL ${SBATCH_OPTIONS:-} --dependency="afterok:$array" \
    --kill-on-invalid-dep=yes "$RETEMPER_ROOT/launch/preprocess_slurm.sh" "$@")
  echo "submitted: array job $array makes $SHARDS parts, then job ${join%%;*} joins them to $prefix"
}

make_part() {
  local part="$prefix.shard-$SLURM_ARRAY_TASK_ID-of-$SHARDS" file
  # .idx is the last of a dataset's files to get its name. A split has a dataset for each side.
  for file in "$part".idx "$part".*.idx; do
    if [[ -e $file && $overwrite == 0 ]]; then
      echo "$part: complete from a run before"
      return
    fi
  done
  # Not all clusters bind a job to its cores.
  "$PYTHON" "$RETEMPER_ROOT/tools/preprocess.py" --workers "${SLURM_CPUS_PER_TASK:-$(nproc)}" "$@" \
    --shard "$SLURM_ARRAY_TASK_ID/$SHARDS"
}

join_parts() {
  local first="$prefix.shard-0-of-$SHARDS" file side place parts again=()
  [[ $overwrite == 0 ]] || again=(--overwrite)
  for file in "$first".idx "$first".*.idx; do
    [[ -e $file ]] || continue
    side=${file#"$first"}
    side=${side%.idx}
    parts=()
    for ((place = 0; place < SHARDS; place++)); do
      parts+=("$prefix.shard-$place-of-$SHARDS$side")
    done
    "$PYTHON" "$RETEMPER_ROOT/tools/merge.py" --inputs "${parts[@]}" --output-prefix "$prefix$side" "${again[@]}"
  done
  echo "$prefix.shard-*-of-$SHARDS.{bin,idx,json} are not needed any more"
}

PYTHON=${PYTHON:-python}
# Slurm runs a copy of this file, which is told where the repository is.
RETEMPER_ROOT=${RETEMPER_ROOT:-$(dirname "$(dirname "$(realpath "$0")")")}
# A copy of this script, as of `retemper launch copy`, runs the installed package.
[[ -f $RETEMPER_ROOT/tools/preprocess.py ]] ||
  RETEMPER_ROOT=$("$PYTHON" -c 'import retemper; print(retemper.__path__[0])')
[[ ${SHARDS:-} =~ ^[1-9][0-9]*$ ]] || fail "SHARDS='${SHARDS:-}': set it to the number of parts, as in SHARDS=64 $0 ..."
facts=$(read_arguments "$@")
overwrite=${facts%%$'\n'*}
prefix=${facts#*$'\n'}
case ${RETEMPER_STAGE:-submit} in
  submit) submit "$@" ;;
  part) make_part "$@" ;;
  join) join_parts ;;
  *) fail "RETEMPER_STAGE='$RETEMPER_STAGE': leave it unset" ;;
esac
