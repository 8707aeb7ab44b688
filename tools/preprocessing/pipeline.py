"""Turn files into indexed datasets.

:func:`preprocess` is the recipe; this is the order of the modules:

    options.py               the options
    run_setup.py             input files (inputs/), tokenizer (tokenizer_choice.py), output paths (dataset/checks.py)
    run_plan.py              tasks (workers/tasks.py), chat template (chat/), held-out n-grams (cleaning/)
    dataset/workspace.py     the work folder, in which a restart finds finished tasks
    workers/pool.py          processes; each runs workers/worker.py: readers/ -> records/ -> chat/ or cleaning/ ->
                             tokenizer -> the task's output
    dataset/publishing.py    outputs -> datasets and sidecars: dataset/assembly.py, dedup/, split, shuffle

The datasets' bytes depend on the input, the tokenizer and the options for documents, not on the number of workers or
the size of tasks. No file gets its final name before all are complete.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...engine.data.index_format import dataset_prefix
from ...engine.errors import UserError, install_command
from ...engine.system import usable_cores
from ...engine.tokenizer.frame import describe_tokens
from .dataset.publishing import PreprocessReport, publish
from .dataset.workspace import finished_results, open_workspace, remove_workspace
from .dedup.across_parts import write_signatures
from .inputs.hub import pin_revisions
from .option_rules import check_options
from .options import PreprocessOptions
from .progress import ProgressReport
from .run_plan import RunPlan
from .run_setup import RunSetup, print_notes
from .workers.pool import run_here, run_tasks, shared_counters
from .workers.task_output import TaskOutput, TaskResult
from .workers.worker import FastPathError

__all__ = ["PreprocessReport", "preprocess", "write_signatures_of_part"]


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize a corpus to ``{output_prefix}.bin``, ``.idx``, ``.json``, and optional files; or write its text.

    Raises:
        UserError: wrong options, input or tokenizer, no token in the input, the output exists or cannot be written, a
            worker was killed. An existing dataset is then unchanged. Finished tasks are kept in a hidden folder, where
            the same command finds them.
    """
    started = time.monotonic()
    with _tokenized(options) as (plan, results):
        report = publish(plan, results)
        remove_workspace(plan.work)
    return replace(report, seconds=time.monotonic() - started)


def write_signatures_of_part(options: PreprocessOptions) -> None:
    """Tokenize a part, and write the signatures of its documents to ``options.signatures``.

    The outputs are kept, and :func:`preprocess` with ``exclude_documents`` makes the dataset from them.

    Raises:
        UserError: as :func:`preprocess`.
    """
    assert options.signatures is not None
    with _tokenized(options) as (plan, _):
        outputs = [TaskOutput(plan.work, key) for key in plan.tasks]
        index, _ = options.shard_place or (0, 1)
        write_signatures(outputs, options, Path(options.signatures), index)


@contextmanager
def _tokenized(options: PreprocessOptions) -> Iterator[tuple[RunPlan, list[TaskResult]]]:
    """Tokenize a corpus in its work folder, which is locked in the context."""
    check_options(options)
    prefix = _checked_prefix(options)
    try:
        pinned = pin_revisions(options.input)
        print_notes(f"{given}: reading {url}" for given, url in zip(options.input, pinned, strict=True) if url != given)
        setup = RunSetup(replace(options, input=pinned), prefix)
        setup.compare_with_serving()
        with open_workspace(prefix) as work:
            yield _tokenize_exactly(setup, work)
    except OSError as error:
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}; no dataset was written") from error


def _tokenize_exactly(setup: RunSetup, work: Path) -> tuple[RunPlan, list[TaskResult]]:
    """Run all tasks; start again with the reference tokenizer if the fast one differs from it."""
    plan = RunPlan(setup, work)
    try:
        return plan, tokenize(plan)
    except FastPathError as difference:
        print(f"{difference}; continuing with the reference tokenizer", file=sys.stderr)
        plan = RunPlan(RunSetup(replace(setup.options, encoder="reference"), setup.prefix), work)
        return plan, tokenize(plan)


def tokenize(plan: RunPlan) -> list[TaskResult]:
    """Run the tasks that are not finished yet; return the results of all, in order."""
    works_here = plan.setup.works_here
    results = finished_results(plan.work, plan.tasks, plan.refused)
    todo = [(task, key) for key, task in plan.tasks.items() if key not in results]
    workers = min(plan.options.workers or usable_cores(), max(len(todo), 1))
    _print_start(plan, workers, len(todo))
    # Counters for all tasks of the corpus: a task's index selects its own.
    num_counters = 3 * (1 + max((task.index for task in plan.tasks.values()), default=0))
    counters = np.zeros(num_counters, np.int64) if works_here else shared_counters(num_counters)
    seen = np.frombuffer(counters, dtype=np.int64).reshape(-1, 3)
    total = sum(task.num_bytes for task in plan.tasks.values())
    before = total - sum(task.num_bytes for task, _ in todo)
    with ProgressReport("cleaning" if plan.options.to_jsonl else "tokenizing", total, before) as progress:

        def show() -> None:
            done, tokens, bad = seen.sum(axis=0).tolist()
            progress.show(before + done, tokens, bad)

        if todo:
            run = (
                run_here(todo, plan.setup.tokenizer, plan.settings, counters, show)
                if works_here
                else run_tasks(todo, workers, plan.setup.tokenizer, plan.settings, counters, show)
            )
            with closing(run):
                results.update((result.key, result) for result in run)
    return [results[key] for key in plan.tasks]


def _print_start(plan: RunPlan, workers: int, num_todo: int) -> None:
    setup = plan.setup
    begin = f"documents begin with {describe_tokens(setup.begin)}" if setup.begin else "documents begin without a BOS"
    end = f"end with {describe_tokens(setup.end)}" if setup.end else "end with no token"
    again = len(plan.tasks) - num_todo
    for note in setup.tokenizer.notes:
        print(note, file=sys.stderr)
    if not (setup.works_here or plan.options.to_jsonl) and setup.tokenizer.lacks_fast_package:
        command = install_command("fastokens")
        print(
            f"note: fastokens, which makes the same dataset in less time, is not installed: {command}", file=sys.stderr
        )
    tokenizer = f"tokenizer {setup.tokenizer.name} ({setup.tokenizer.vocab_size:,} ids); {begin} and {end}"
    print(
        f"{len(plan.files)} input files, {sum(file.size for file in plan.files) / 1e6:,.1f} MB; "
        f"{'text is not tokenized' if plan.options.to_jsonl else tokenizer}; {workers} "
        "workers" + (f"; {again} of {len(plan.tasks)} parts are finished already" if again else ""),
        file=sys.stderr,
        flush=True,
    )


def _checked_prefix(options: PreprocessOptions) -> str:
    prefix = dataset_prefix(options.output_prefix)
    if not os.path.basename(prefix):
        raise UserError(
            f"--output-prefix {options.output_prefix}: names a folder; add a file name, such as {prefix}dataset"
        )
    if options.shard_place is not None:
        prefix += ".shard-{}-of-{}".format(*options.shard_place)
    return prefix
