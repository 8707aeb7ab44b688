"""The demonstration's report: the numbers it shows, and that it is one sound HTML file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.html_page import Page

from retemper.engine.errors import UserError
from retemper.tools.demo.charts import COLOURS, Interruption, read_metrics, require_matplotlib
from retemper.tools.demo.report import (
    Command,
    LossChange,
    ReportData,
    Sample,
    describe_environment,
    format_table,
    write_report,
)

HOSTILE = "<script>alert('&')</script>\x00\x1b"


def training_line(step: int, loss: float) -> dict[str, Any]:
    rest = {"learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 12_000.0}
    return {"step": step, "tokens": 1000 * step, "loss": loss, **rest}


def evaluation_line(step: int, name: str, loss: float) -> dict[str, Any]:
    return {"step": step, "tokens": 1000 * step, "evaluation": name, "loss": loss, "perplexity": math.exp(loss)}


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    records = [evaluation_line(0, "domain", 4.0), evaluation_line(0, "general", 3.0)]
    records += [training_line(step, 4.0 - 0.1 * step) for step in range(1, 11)]
    records += [evaluation_line(10, "domain", 3.0), evaluation_line(10, "general", 3.12)]
    return ReportData(
        domain=LossChange(before=4.0, after=3.0),
        general=LossChange(before=3.0, after=3.12),
        metrics=write_lines(tmp_path / "metrics.jsonl", records),
        configuration="train_tokens: 10_000\n",
        commands=(Command("python first.py", 4.25), Command("python second.py", 58.0)),
        facts={"Parameters": "1,234,567"},
        environment={"Python": "3.11"},
        samples=(Sample("def f(x):", " the array", "\n    return x"),),
        interruptions=(Interruption(killed_at=6000, resumed_at=6000),),
    )


def render(data: ReportData, tmp_path: Path) -> str:
    path = tmp_path / "new" / "report.html"
    write_report(path, data)
    return path.read_text(encoding="utf-8")


def test_table_gives_losses_and_says_what_was_forgotten(data: ReportData) -> None:
    assert format_table(data) == (
        "corpus    loss before   after             change   perplexity before    after\n"
        "domain          4.000   3.000   -1.000 (-25.0 %)                54.6     20.1\n"
        "general         3.000   3.120    +0.120 (+4.0 %)                20.1     22.6\n"
        "\n"
        "domain loss fell by 1.000 nats (-25.0 %): learned\n"
        "general loss rose by 0.120 nats (+4.0 %): forgotten"
    )


@pytest.mark.parametrize(
    ("before", "after", "domain", "general"),
    [
        (2.0, 1.5, "fell by 0.500 nats (-25.0 %): learned", "fell by 0.500 nats (-25.0 %): nothing forgotten"),
        (2.0, 2.5, "rose by 0.500 nats (+25.0 %): not learned", "rose by 0.500 nats (+25.0 %): forgotten"),
        (2.0, 2.0004, "did not change", "did not change"),
    ],
)
def test_verdict_follows_the_sign(data: ReportData, before: float, after: float, domain: str, general: str) -> None:
    change = LossChange(before, after)
    lines = format_table(dataclasses.replace(data, domain=change, general=change)).splitlines()
    assert lines[-2:] == [f"domain loss {domain}", f"general loss {general}"]


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    change = LossChange(before=math.log(50), after=math.log(40))
    assert change.perplexity_before == pytest.approx(50)
    assert change.perplexity_after == pytest.approx(40)
    assert change.perplexity_percent == pytest.approx(-20)


def test_page_is_sound_html_with_the_numbers(data: ReportData, tmp_path: Path) -> None:
    page = Page(render(data, tmp_path))
    for expected in (
        "domain 4.000 3.000 -1.000 -25.0 % 54.6 20.1 -63.2 %",
        "general 3.000 3.120 +0.120 +4.0 % 20.1 22.6 +12.7 %",
        "general loss rose by 0.120 nats (+4.0 %): forgotten",
        "python first.py 4.2 s python second.py 58.0 s all commands 1 min 02 s",
        "killed, resumed here",
        "train_tokens: 10_000",
        "Parameters 1,234,567",
        "before def f(x): the array after def f(x): return x",
    ):
        assert expected in page.text
    assert page.tags.count("svg") == 1
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_page_needs_nothing_but_itself(data: ReportData, tmp_path: Path) -> None:
    Page(render(data, tmp_path)).require_self_contained()


def test_curves_take_the_colours_of_the_page(data: ReportData, tmp_path: Path) -> None:
    text = render(data, tmp_path)
    assert not any(placeholder in text for placeholder in COLOURS)
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert set(re.findall(r"var\(--\w+\)", svg)) == set(COLOURS.values())
    for variable in COLOURS.values():
        name = variable.removeprefix("var(").removesuffix(")")
        assert text.count(f"{name}: #") == 2, "one value in light, one in dark"


def test_page_escapes_every_text(data: ReportData, tmp_path: Path) -> None:
    hostile = dataclasses.replace(
        data,
        title=HOSTILE,
        configuration=HOSTILE,
        commands=(Command(HOSTILE, 1.0),),
        facts={HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        samples=(Sample(HOSTILE, HOSTILE, HOSTILE),),
    )
    text = render(hostile, tmp_path)
    page = Page(text)
    assert "script" not in page.tags
    # title twice, configuration, command, both facts, both of the environment, prompt twice, two continuations
    assert page.text.count("<script>alert('&')</script>") == 12
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)


def test_same_data_gives_the_same_page(data: ReportData, tmp_path: Path) -> None:
    assert render(data, tmp_path) == render(data, tmp_path)


def test_redone_steps_count_once_and_are_marked(data: ReportData, tmp_path: Path) -> None:
    records = [training_line(1, 9.0), training_line(2, 8.0), evaluation_line(2, "domain", 7.0)]
    records += [training_line(2, 5.0), evaluation_line(2, "domain", 4.0), training_line(3, 3.0)]
    path = write_lines(tmp_path / "resumed.jsonl", records)
    metrics = read_metrics(path)
    assert [(point.tokens, point.loss) for point in metrics.training] == [(1000, 9.0), (2000, 5.0), (3000, 3.0)]
    assert metrics.evaluations == {"domain": [(2000, 4.0)]}
    interruptions = (Interruption(killed_at=2000, resumed_at=1000),)
    text = render(dataclasses.replace(data, metrics=path, interruptions=interruptions), tmp_path)
    assert "killed, resumed 1,000 tokens earlier" in Page(text).text


def test_unreadable_metrics_name_the_file_and_the_line(data: ReportData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot read"):
        write_report(tmp_path / "report.html", dataclasses.replace(data, metrics=tmp_path / "nowhere.jsonl"))
    data.metrics.write_text('{"step": 1}\n{"step"', encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        write_report(tmp_path / "report.html", data)
    assert not (tmp_path / "report.html").exists()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape("pip install matplotlib")):
        require_matplotlib()


def test_environment_names_versions() -> None:
    environment = describe_environment()
    assert environment["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["torch"] and int(environment["CPU cores"]) > 0
