"""Faults of every kind against real torchrun runs: ``python tests/faults/run.py --cases 200 --seed 1 --output DIR``.

Every case is one fault; the same command is launched again, and what it comes to is compared, bit for bit, with an
undisturbed run: the loss curve, and all tensors of every checkpoint that is seen on the way. Cases are chained in
lineages, so that each costs about one launch. Prints a table by kind, and ends with 1 when anything was wrong.

    --only disk-full.2               this case alone
    --only kill-rank.0,damage.3      a lineage of these, in this order
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_cases import Case, catalogue, draw
from fault_launch import INTERRUPTED
from fault_lineage import Lineage, Result
from fault_report import MARKS, WRONG, describe, lineages, table
from fault_setup import set_up
from fault_sweep import damages, sweep
from tqdm import tqdm


def run_all(
    cases: list[Case], folder: Path, jobs: int, seed: int, with_sweep: bool
) -> tuple[list[Result], tuple[int, list[str]] | None]:
    """Run ``cases``, ``jobs`` lineages at a time, and :func:`sweep`; results of both."""
    workshop = set_up(folder)
    with tqdm(total=len(cases), unit="case", disable=None) as bar:

        def on_result(result: Result) -> None:
            bar.update()
            if result.verdict in WRONG:
                bar.write(describe(result))

        def run_one(numbered: tuple[int, list[Case]]) -> list[Result]:
            number, chain = numbered
            return Lineage(workshop, f"lineage{number:03d}", chain, on_result).run()

        with ThreadPoolExecutor(jobs) as pool:
            try:
                results = [result for done in pool.map(run_one, enumerate(lineages(cases))) for result in done]
            except KeyboardInterrupt:
                INTERRUPTED.set()  # every lineage ends its processes and mounts
                raise
    swept = None
    if with_sweep:
        with tqdm(total=len(damages(seed)), unit="damage", disable=None, leave=False) as bar:
            swept = sweep(workshop.midway(), folder / "sweep", seed, bar.update)
    return results, swept


def _selected(arguments: argparse.Namespace) -> list[Case]:
    if arguments.only is None:
        return catalogue(arguments.cases, arguments.seed)
    names = [name.rpartition(".") for name in arguments.only.split(",")]
    return [draw(kind, int(number), arguments.seed) for kind, _, number in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="number of cases (200)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (1)")
    parser.add_argument("--only", help="names of cases, with commas: one lineage of these")
    parser.add_argument("--output", type=Path, required=True, help="folder: faults.json, table.md, what went wrong")
    parser.add_argument("--keep", action="store_true", help="keep the logs of all launches")
    parser.add_argument("--docs", type=Path, help="put the table into this file, between its two marks")
    parser.add_argument("--jobs", type=int, default=1, help="lineages at a time; each uses about two cores (1)")
    arguments = parser.parse_args()
    # Asked to end in whatever way, it leaves no process and no mount behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments.output.exists():
        parser.error(f"--output {arguments.output}: exists already; remove it or name another")
    arguments.output.mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(prefix="retemper-faults-"))
    failed: list[Result] = []
    began, cases, only = time.monotonic(), _selected(arguments), arguments.only is not None
    try:
        results, swept = run_all(cases, scratch, arguments.jobs, arguments.seed, not only)
        failed = [result for result in results if result.verdict in WRONG]
        for name in sorted({result.lineage for result in (results if arguments.keep else failed)}):
            shutil.copytree(scratch / name, arguments.output / name, symlinks=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    minutes = (time.monotonic() - began) / 60
    write_report(arguments, results, swept, minutes)
    print(f"{table(results, swept)}\n\n{len(results)} cases in {minutes:.1f} minutes; {arguments.output}/faults.json")
    for problem in swept[1] if swept else []:
        print(problem)
    return 1 if failed or (swept and swept[1]) else 0


def write_report(
    arguments: argparse.Namespace, results: list[Result], swept: tuple[int, list[str]] | None, minutes: float
) -> None:
    """faults.json and table.md."""
    content: dict[str, Any] = {
        "seed": arguments.seed,
        "torch": torch.__version__,
        "minutes": round(minutes, 1),
        "swept": swept and {"tried": swept[0], "wrong": swept[1]},
        "cases": [asdict(result) for result in results],
    }
    (arguments.output / "faults.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.output / "table.md").write_text(table(results, swept) + "\n")
    if arguments.docs:
        said = f"`make faults`, seed {arguments.seed}, PyTorch {torch.__version__}, {minutes:.0f} minutes:"
        text = arguments.docs.read_text(encoding="utf-8")
        before, begin, rest = text.partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not begin or not end:
            raise SystemExit(f"--docs {arguments.docs}: has no lines {MARKS[0]} and {MARKS[1]}")
        table_text = f"\n\n{said}\n\n{table(results, swept)}\n\n"
        arguments.docs.write_text(before + begin + table_text + end + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
