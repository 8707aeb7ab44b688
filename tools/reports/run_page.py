"""Format a run as a summary for the terminal and as a page with tables and curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from ...engine.observe.loss_changes import LossChange
from ..checkpoint_report.listing import COLUMNS, listing_cells
from .charts import COLORS, SMALL, Axis, ChartLine, Mark, compact, line_chart, percent
from .models import COLUMNS as MODEL_COLUMNS
from .page import bullets, definitions, escape, header, note, page, preformatted, section, table
from .run import GeneratedSample, RecordedRun, Restart, differences
from .text import fact_lines, table_lines, visible

Table = tuple[Sequence[str], Sequence[tuple[str, ...]]]
"""Header, and rows with as many cells."""
_LOSS_HEAD = ("validation set", "steps", "loss before", "after", "change", "%", "", "perplexity", "lowest loss")
_MOST_CHECKPOINTS = 12
"""Maximum number of checkpoints shown in the terminal."""


def format_run(run: RecordedRun, other: RecordedRun | None = None) -> str:
    """Return the summary for the terminal."""
    checkpoints = checkpoint_table(run)
    left_out = len(checkpoints[1]) - _MOST_CHECKPOINTS
    tables = [restart_table(run), data_table(run), (checkpoints[0], checkpoints[1][-_MOST_CHECKPOINTS:])]
    if other is not None:
        tables += [comparison_table(run, other), difference_table(run, other)]
    sections = [
        fact_lines({"run": run.folder, **run_facts(run)}),
        [f"! {visible(remark)}" for remark in run.remarks],
        [*_lines(loss_table(run)), *map(visible, verdicts(run))],
        *map(_lines, tables[:3]),
        [f"and {left_out:,} older checkpoints"] if left_out > 0 else [],
        _lines(model_table(run)),
        *map(_lines, tables[3:]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def run_page(run: RecordedRun, other: RecordedRun | None = None, title: str = "", more: Iterable[str] = ()) -> str:
    """Return the page of a run.

    Args:
        other: a run to compare with, drawn with dashed curves.
        title: of the page. Empty: the name of the run folder.
        more: further sections, placed before the configuration.
    """
    sections = [
        header(title or f"Run {_name(run)}", _cards(run)),
        section("Remarks", bullets(run.remarks), kind="warnings"),
        section("Validation loss and perplexity", _validation(run)),
        section("Curves", _curves(run, other)),
        section("The run", definitions(run_facts(run)) + table(*restart_table(run)), kind="facts"),
        section(f"Compared with {_names(run, other)[1]}", _comparison(run, other)) if other else "",
        section("Samples", "".join(map(_sample, run.samples))),
        section("Data", _data(run)),
        section("Checkpoints", table(*checkpoint_table(run))),
        section("Models", table(*model_table(run))),
        *more,
        section("Configuration", preformatted(run.configuration.strip())),
        section("Written by", definitions(run.environment)),
    ]
    return page(title or f"Run {_name(run)}", sections, STYLE)


# ----------------------------------------------------------------------------------------------------------------------
# Facts and tables for the page and the terminal


def _state(run: RecordedRun) -> str:
    if run.is_finished:
        return "stopped early" if run.stopped_early else "finished"
    return f"not finished; the last record was written at {run.last_record}"


def run_facts(run: RecordedRun) -> dict[str, str]:
    """Return progress, speed and model of the run."""
    budget = run.train_tokens
    share = "" if budget is None else f" of {budget:,} ({run.tokens / budget:.1%})"
    losses = run.curves.points("loss")
    speed, each = run.median("tokens_per_second"), run.median("tokens_per_second_per_rank")
    utilization, memory = run.median("mfu"), run.maximum("peak_memory_bytes")
    again = sum(restart.lost_step - restart.step for restart in run.restarts)
    facts = {
        "state": _state(run),
        "tokens": f"{run.tokens:,}{share}",
        "steps": f"{run.step:,}" + (f"; {again:,} repeated after restarts" if again else ""),
        "starts": "" if run.starts is None else f"{run.starts:,}",
        "time in steps": str(timedelta(seconds=round(run.seconds_in_steps))),
        "training loss": f"{losses[0][1]:.4f} at first, {run.final_loss:.4f} in the last records" if losses else "",
        "tokens per second": "" if speed is None else f"{speed:,.0f} (median), {each or speed:,.0f} per rank",
        "MFU": "" if utilization is None else f"{utilization:.1%} (median)",
        "peak memory": "" if memory is None else f"{memory / 2**30:.2f} GiB on rank 0",
        **run.logged,
    }
    return {name: value for name, value in facts.items() if value}


def loss_table(run: RecordedRun) -> Table:
    """Return first, last and lowest loss of each validation set and of its parts."""
    changes = run.curves.changes()
    rows = []
    for name, found in run.curves.evaluations.items():
        last, best = found[-1], min(found, key=lambda one: one.loss)
        after, lowest = (f"{last.loss:.3f}", f"{last.perplexity:.1f}"), f"{best.loss:.3f} (step {best.step:,})"
        cells = [name, f"{last.step:,}", "", after[0], "", "", "", after[1], lowest]
        if change := changes.get(name):
            before, losses = change.before, change.losses
            cells[1:3] = f"{before.step:,} → {last.step:,}", f"{before.loss:.3f}"
            cells[4:8] = *losses.cells(), losses.outcome, f"{before.perplexity:.1f} → {after[1]}"
        rows.append(tuple(cells))
    return _LOSS_HEAD, rows


def verdicts(run: RecordedRun) -> list[str]:
    """Return a sentence for each validation set with several evaluations: learned or forgotten."""
    first, *_ = [*run.curves.sets, None]
    changes = run.curves.changes()
    return [
        _verdict(name, changes[name].losses, is_domain=name == first) for name in run.curves.sets if name in changes
    ]


def _verdict(name: str, loss: LossChange, is_domain: bool) -> str:
    if loss.outcome == "unchanged":
        return f"{name} loss did not change"
    if loss.outcome == "not comparable":
        return f"{name} loss is not a number"
    if loss.change < 0:
        verb, meaning = "fell", "learned" if is_domain else "nothing forgotten"
    else:
        verb, meaning = "rose", "not learned" if is_domain else "forgotten"
    return f"{name} loss {verb} by {abs(loss.change):.3f} nats ({loss.percent:+.1f} %): {meaning}"


def restart_table(run: RecordedRun) -> Table:
    """Return the restarts, after which some steps were repeated."""
    rows = [
        (one.kind, f"{one.step:,}", f"{one.lost_step:,}", f"{one.lost_step - one.step:,}", one.file)
        for one in run.restarts
    ]
    return ("restart", "continued from step", "after reaching step", "steps repeated", "former records"), rows


def data_table(run: RecordedRun) -> Table:
    """Return the training sources and the tokens used up to the newest checkpoint."""
    totals = [
        sum(filter(None, weights)) or 1.0 for weights in zip(*(source.weights for source in run.sources), strict=True)
    ]
    rows = [
        (
            source.name,
            " then ".join(f"{(weight or 0) / total:.1%}" for weight, total in zip(source.weights, totals, strict=True)),
            *(_count(source.tokens), _count(source.trained_tokens)),
            *("" if source.epochs is None else f"{source.epochs:.3g}", source.fingerprint[:16], source.path),
        )
        for source in run.sources
    ]
    return ("training source", "weight", "tokens", "trained on", "epochs", "content hash", "path"), rows


def checkpoint_table(run: RecordedRun) -> Table:
    """Return all checkpoints by step, and why each is kept."""
    return COLUMNS, [listing_cells(row) for row in run.checkpoints]


def model_table(run: RecordedRun) -> Table:
    """Return the model folders of the run."""
    return MODEL_COLUMNS, [model.cells for model in run.models]


def comparison_table(run: RecordedRun, other: RecordedRun) -> Table:
    """Return the results of two runs side by side."""
    sides = (run, other)
    columns = [run_facts(one) for one in sides]
    names = ("state", "tokens", "training loss", "time in steps", "tokens per second", "MFU", "peak memory")
    rows = [(name, *(facts.get(name, "") for facts in columns)) for name in names if any(name in f for f in columns)]
    for name in dict.fromkeys(name for one in sides for name in one.curves.evaluations):
        found = [one.curves.evaluations.get(name) for one in sides]
        cells = ["" if one is None else f"{one[-1].loss:.3f} at step {one[-1].step:,}" for one in found]
        rows.append((f"{name} loss", *cells))
    return ("", *_names(run, other)), rows


def difference_table(run: RecordedRun, other: RecordedRun) -> Table:
    """Return the settings, data and versions that differ between two runs."""
    return ("differs", *_names(run, other)), [(key, *values) for key, values in differences(run, other).items()]


def _name(run: RecordedRun) -> str:
    return Path(run.folder).absolute().name


def _names(run: RecordedRun, other: RecordedRun | None) -> tuple[str, str]:
    if other is None or _name(run) != _name(other):
        return _name(run), _name(other or run)
    return run.folder, other.folder


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _lines(content: Table) -> list[str]:
    return list(table_lines(*content)) if content[1] else []


# ----------------------------------------------------------------------------------------------------------------------
# The page


def _cards(run: RecordedRun) -> Iterator[tuple[str, str, str]]:
    changes = {name: one for name, one in run.curves.changes().items() if name in run.curves.sets}
    for color, loss, sentence in zip(COLORS, changes.values(), verdicts(run), strict=False):
        yield color, f"{loss.before.loss:.3f} → {loss.after.loss:.3f}", sentence
    if not changes and run.final_loss is not None:
        yield "blue", f"{run.curves.points('loss')[0][1]:.3f} → {run.final_loss:.3f}", "training loss"
    facts = run_facts(run)
    yield "grey", f"{run.tokens:,} tokens", facts["state"]
    if speed := run.median("tokens_per_second"):
        yield "grey", f"{speed:,.0f} tokens/s", f"MFU {facts['MFU']}" if "MFU" in facts else "median of all records"


def _validation(run: RecordedRun) -> str:
    found = run.curves.evaluations
    if not found:
        return note(
            "No evaluation is recorded; set data.validation or data.validation_fraction to evaluate during a run."
        )
    words = "Loss in nats per token on held-out documents; perplexity is its exponential."
    first, *others = run.curves.sets
    if others:
        words += f" Learned: a lower loss on {first}, the first set. Forgotten: a higher loss on {', '.join(others)}."
    colors = _colors(run.curves.evaluations)
    lines = [
        ChartLine(name, [(one.tokens, one.loss - change.before.loss) for one in found[name]], colors[name], dots=True)
        for name, change in run.curves.changes().items()
    ]
    axes = Axis("tokens consumed"), Axis()
    chart = line_chart("Learned and forgotten: loss since the first evaluation", lines, *axes) if len(lines) > 1 else ""
    return table(*loss_table(run)) + note(words) + f'<div class="charts">{chart}</div>'


def _side(is_other: int) -> str:
    """Return the color of a run's training curves."""
    return "red" if is_other else "grey"


def _colors(names: Iterable[str]) -> dict[str, str]:
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


def _curves(run: RecordedRun, other: RecordedRun | None) -> str:
    sides = [run] if other is None else [run, other]
    lines = []
    for one, name in zip(sides, _names(run, other), strict=False):
        of = f", {name}" if other is not None else ""
        dashed = one is not run
        lines.append(ChartLine(f"training{of}", one.curves.points("loss"), _side(dashed), dashed))
        for label, color in _colors(one.curves.sets).items():
            points = [(evaluation.tokens, evaluation.loss) for evaluation in one.curves.evaluations[label]]
            lines.append(ChartLine(f"{label}{of}", points, color, dashed, dots=True))
    marks = [_mark(restart) for restart in run.restarts]
    loss = line_chart("Loss, in nats per token", lines, Axis("tokens consumed"), marks=marks)
    unlabelled = [Mark(mark.at, since=mark.since) for mark in marks]
    small = "".join(_small_chart(sides, column, title, unlabelled) for column, title in _SMALL_CHARTS.items())
    return loss + f'<div class="charts">{small}</div>'


_SMALL_CHARTS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization (MFU)",
    "expert_load_max": "Largest load of an expert / mean load",
    "router_aux_loss": "Load-balancing loss",
}


def _small_chart(sides: Sequence[RecordedRun], column: str, title: str, marks: Sequence[Mark]) -> str:
    lines = [
        ChartLine("", one.curves.points(column), _side(number), dashed=bool(number)) for number, one in enumerate(sides)
    ]
    values = sorted(value for line in lines for _, value in line.points)
    # Norms are recorded before clipping: on a linear axis a spike would flatten all others.
    wide = column == "grad_norm" and bool(values) and values[0] > 0 and values[-1] > 20 * values[len(values) // 2]
    up = Axis(log=10) if wide else Axis(start=0, write=percent if column == "mfu" else compact)
    return line_chart(title, lines, Axis(), up, marks, SMALL)


def _mark(restart: Restart) -> Mark:
    again = restart.lost_tokens - restart.tokens
    return Mark(restart.lost_tokens, f"{restart.kind} {again:,} tokens earlier", restart.tokens)


def _comparison(run: RecordedRun, other: RecordedRun) -> str:
    different = table(*difference_table(run, other), kind="wrapped")
    return table(*comparison_table(run, other), kind="wrapped") + (different or note("All settings are the same."))


def _data(run: RecordedRun) -> str:
    remark = (
        "Weights are shares of the samples in each stage. Tokens trained on are counted up to the newest checkpoint."
    )
    sets = (("validation set", "path"), list(run.validation.items()))
    return (
        table(*data_table(run), kind="wrapped") + (note(remark) if run.sources else "") + table(*sets, kind="wrapped")
    )


def _sample(sample: GeneratedSample) -> str:
    def column(label: str, continuation: str) -> str:
        text = f"<mark>{escape(sample.prompt)}</mark>{escape(continuation)}"
        return f"<figure><figcaption>{label}</figcaption><pre>{text}</pre></figure>"

    before, after = (
        name if step is None else f"{name} (step {step:,})"
        for name, step in (("before", sample.before_step), ("after", sample.after_step))
    )
    return f'<div class="sample">{column(before, sample.before)}{column(after, sample.after)}</div>'


STYLE = """
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin-bottom: 1rem; }
.sample pre { flex: 1; }
mark { background: none; color: var(--blue); font-weight: 600; }
.code tbody td:first-child { font: .8rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .sample { grid-template-columns: 1fr 1fr; } }
"""
