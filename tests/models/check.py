"""Check that models of these types train exactly: ``python tests/models/check.py olmo2 phi3``, or ``--all``.

Every type has a tiny model in ``tiny_models.json``. What is checked is described at :func:`model_check.check`. Prints a
line for each type, and ends with 1 if anything was wrong. ``--write-docs`` writes the results to docs/models.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from forked import fork_server
from model_check import SERVER_MODULES, Checked, check
from model_table import TYPES
from models_page import write_table


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process."""
    parser = argparse.ArgumentParser(description="Check that models of these types train exactly.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="a model_type in tests/models/tiny_models.json")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument(
        "--implementation", choices=("auto", "native", "transformers"), default="auto", help="model.implementation"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of types at a time; each keeps two cores busy")
    parser.add_argument("--folder", type=Path, help="keep all files of the runs in this new folder")
    parser.add_argument("--write-docs", action="store_true", help="write the table in docs/models.md; needs --all")
    options = parser.parse_args()
    unknown = sorted({*options.types} - {*TYPES})
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in tests/models/tiny_models.json")
    if bool(options.types) == options.all or (options.write_docs and not options.all):
        parser.error("name types, or give --all; --write-docs needs --all")
    return options


def check_all(types: tuple[str, ...], folder: Path, implementation: str, jobs: int) -> Iterator[Checked]:
    """Yield what :func:`check` finds about each type, in their order."""
    with fork_server(*SERVER_MODULES) as context, ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda name: check(context, name, folder / name, implementation), types)


def describe(found: Checked) -> str:
    """Return a line about a type."""
    numbers = f"losses {found.loss_error:.1e}  logits {found.logits_error:.1e}  {found.seconds:4.1f} s"
    if found.problem:
        return f"{found.model_type:20} WRONG    {found.problem.splitlines()[-1]}"
    if found.refusal:
        return f"{found.model_type:20} refused  {found.refusal}"
    how = f"{found.implementation} {found.documents}"
    return f"{found.model_type:20} ok       {how:28} {numbers}  {', '.join(found.axes)}"


def main() -> None:
    """Run the command line of this process."""
    options = parse_arguments()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        types = TYPES if options.all else tuple(options.types)
        for found in check_all(types, folder, options.implementation, options.jobs):
            results.append(found)
            print(describe(found), flush=True)
    if options.write_docs:
        write_table(results)
    sys.exit(any(found.problem for found in results))


if __name__ == "__main__":
    main()
