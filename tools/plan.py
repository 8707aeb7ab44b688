"""Plan a run on a laptop: memory, traffic and time of its layout, without GPUs and without weights.

    python tools/plan.py --config megatron_configs/qwen2_72b.yaml --nodes 4 --gpus-per-node 8 --gpu a100-80gb
    python tools/plan.py --config run.yaml --nodes 2 --gpus-per-node 8 --gpu h100-80gb --search --json plan.json

This file is the command line of retemper.tools.planning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.parser import build_parser as build_settings_parser
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, require_report, write_json_report
from retemper.engine.guards.garbage_collection import without_gc
from retemper.engine.system import end_with_parent
from retemper.tools.planning.gpus import GPUS
from retemper.tools.planning.options import EFFICIENCY, HOST_BANDWIDTH, RESERVE, PlanOptions, read_architecture


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Make a dry run of a training step, without GPUs and without weights: the real model and "
        "parallel code run as one rank of the cluster. Reports memory, traffic and time. Time is predicted from "
        "datasheets and from assumptions that are printed.",
        epilog="All other options are those of engine/pretrain.py, such as --parallel.tensor 8.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE|URL", help="configuration, as for engine/pretrain.py"
    )
    _add_cluster(parser.add_argument_group("cluster"))
    _add_gpu(parser.add_argument_group("a GPU that is not in that list, instead of --gpu"))
    _add_assumptions(parser.add_argument_group("assumptions of the prediction"))
    parser.add_argument(
        "--search", action="store_true", help="try layouts, rank those that fit, and dry run the fastest in full"
    )
    parser.add_argument(
        "--quick", action="store_true", help="dry run a few blocks and extrapolate, instead of all of them"
    )
    parser.add_argument("--savings", action="store_true", help="list changes of single settings that need less memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    parser.mark_usual("--config", "--nodes", "--gpus-per-node", "--gpu", "--search", "--quick", "--savings", "--json")
    parser.take_settings(build_settings_parser)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command, and return the others, which belong to the run's configuration."""
    options, rest = build_parser().parse_known_args(arguments)
    return options, [word for file in options.config for word in ("--config", file)] + rest


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="default: %(default)s")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--gpu", metavar="NAME", help=f"{', '.join(GPUS)}; the memory size may be omitted: h200, rtx4090"
    )


def _add_gpu(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory available to PyTorch")
    group.add_argument("--gpu-tflops", type=float, metavar="N", help="dense bf16 TFLOP/s from the datasheet")
    group.add_argument(
        "--gpu-bandwidth",
        type=float,
        metavar="GB/S",
        help="memory bandwidth (default: in proportion to the TFLOP/s, as of an A100)",
    )
    group.add_argument(
        "--gpu-link",
        type=float,
        metavar="GB/S",
        help="bandwidth to the server's other GPUs, one direction (default: PCIe 4, 32)",
    )


def _add_assumptions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--efficiency",
        type=float,
        default=EFFICIENCY,
        metavar="PART",
        help="fraction of the GPU's peak reached while computing (default: %(default)s)",
    )
    group.add_argument(
        "--network",
        type=float,
        metavar="GBIT",
        help="network between nodes, per GPU, in Gbit/s (default: that of the GPU's usual server)",
    )
    group.add_argument(
        "--host-bandwidth",
        type=float,
        default=HOST_BANDWIDTH / 1e9,
        metavar="GB/S",
        help="bandwidth of host memory per GPU, for parallel.cpu_offload (default: two channels of DDR5, %(default)g)",
    )
    group.add_argument(
        "--host-memory",
        type=float,
        metavar="GIB",
        help="memory of each node for what is offloaded; layouts that need more do not fit (default: not compared)",
    )
    group.add_argument(
        "--reserve",
        type=float,
        default=RESERVE / 2**30,
        metavar="GIB",
        help="memory of each GPU reserved for what is not counted (default: %(default)g)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options, run_arguments = parse_arguments(arguments)
    end_with_parent()
    config = parse_config(run_arguments)
    if options.json is not None:
        require_report("--json", options.json, [Use("--config", path) for path in options.config])
    plan_options = PlanOptions(
        options.nodes,
        options.gpus_per_node,
        options.gpu,
        options.efficiency,
        options.reserve,
        options.network,
        options.gpu_memory,
        options.gpu_tflops,
        options.gpu_bandwidth,
        options.gpu_link,
        options.host_bandwidth,
        options.host_memory,
    )
    cluster = plan_options.cluster(read_architecture(config.model))
    with without_gc():
        from retemper.tools.planning.command import list_savings, make_plan

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if options.savings and (options.search or options.quick):
        raise UserError("--savings dry runs a few blocks of the configured layout; remove --search and --quick")
    if options.savings:
        text, record = list_savings(config, cluster, say)
    else:
        text, record = make_plan(config, cluster, options.search, options.quick, say)
    print(text)
    if options.json is not None:
        write_json_report("--json", options.json, record)


if __name__ == "__main__":
    run_command(main)
