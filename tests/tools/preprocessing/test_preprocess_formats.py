"""Every format, tokenizer kind and shape of record through the preprocess command, to the ids of its library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet
import pytest
import sentencepiece
import tiktoken.load
from oracles.megatron_index import read_megatron
from oracles.preprocessing import jsonl, plain_ids, report, run
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece, write_tiny_tiktoken
from transformers import AutoTokenizer

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.tools import preprocess as command
from retemper.tools.preprocessing import pipeline
from retemper.tools.preprocessing.report import format_report
from retemper.tools.preprocessing.workers.worker import FastPathError

TEXTS = [sample_text(seed, 6).replace("\n", " ") for seed in range(20)]


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pa.table({"text": texts, "n": range(len(texts))}), path, row_group_size=2)


def write_xlsx(path: Path, texts: list[str]) -> None:
    book = openpyxl.Workbook()
    for row in [["n", "text"], *([number, text] for number, text in enumerate(texts))]:
        book.active.append(row)
    book.save(path)


@pytest.mark.parametrize("task_bytes", [None, 50])
def test_a_folder_of_every_format(tmp_path, tiny_tokenizer, task_bytes):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS[:4]], indent=1))
    (data / "b.csv").write_text("n,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS[4:6])))
    (data / "c.tsv").write_text("text\tn\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(TEXTS[6:8])))
    write_parquet(data / "d.parquet", TEXTS[8:13])
    write_xlsx(data / "e.xlsx", TEXTS[13:16])
    (data / "f").mkdir()  # next to tables Markdown describes them
    (data / "f" / "f.md").write_text(f"# {TEXTS[16]}\n\n*{TEXTS[17]}*\n")
    (data / "g.html").write_text(f"<html><head><title>x</title></head><body><p>{TEXTS[18]}</p></body></html>")
    (data / "h.txt").write_text(TEXTS[19])
    (data / "i.doc").write_text("not a format")
    sidecar = run(tiny_tokenizer, tmp_path, data, task_bytes=task_bytes)
    written = read_megatron(tmp_path / "out").documents
    assert written[:16] == plain_ids(tiny_tokenizer, TEXTS[:16])
    assert written[-1:] == plain_ids(tiny_tokenizer, TEXTS[19:])
    markdown, html = (AutoTokenizer.from_pretrained(tiny_tokenizer).decode(d[0][:-1]) for d in written[16:18])
    assert TEXTS[16].strip() in markdown and TEXTS[17].strip() in markdown
    assert TEXTS[18].strip() in html and "<p>" not in html
    assert (sidecar.documents, sidecar.sources[0].files) == (19, 8)


def test_lines_of_text_and_templates(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    run(tiny_tokenizer, tmp_path / "lines", tmp_path / "a.txt", txt_mode="line", task_bytes=60)
    assert read_megatron(tmp_path / "lines" / "out").documents == plain_ids(tiny_tokenizer, TEXTS)
    records = [{"title": f"T{n}", "body": {"plain": text}, "year": n} for n, text in enumerate(TEXTS)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, keys, expected in (
        ("several", ["title", "body.plain"], [f"T{n}\n\n{text}" for n, text in enumerate(TEXTS)]),
        ("template", ["# {title} ({year})\n{body.plain}"], [f"# T{n} ({n})\n{text}" for n, text in enumerate(TEXTS)]),
    ):
        run(tiny_tokenizer, tmp_path / name, tmp_path / "b.jsonl", json_key=keys)
        assert read_megatron(tmp_path / name / "out").documents == plain_ids(tiny_tokenizer, expected)


def test_standard_input(tmp_path, tiny_tokenizer):
    (tmp_path / "first.jsonl").write_bytes(jsonl(["first"]))
    arguments = ["--input", "first.jsonl", "-", "--tokenizer", str(tiny_tokenizer), "--workers", "1"]
    script = [sys.executable, command.__file__, *arguments]
    subprocess.run(script, input=jsonl(TEXTS), cwd=tmp_path, check=True, capture_output=True)
    assert read_megatron(tmp_path / "dataset").documents == plain_ids(tiny_tokenizer, ["first", *TEXTS])
    lines = "\n".join(TEXTS).encode()
    more = ["--stdin-format", "txt-lines", "--output-prefix", "lines"]
    subprocess.run([*script, *more], input=lines, cwd=tmp_path, check=True, capture_output=True)
    assert read_megatron(tmp_path / "lines").documents == plain_ids(tiny_tokenizer, ["first", *TEXTS])


def test_sentencepiece_model(tmp_path):
    model = train_tiny_sentencepiece(tmp_path / "sp" / "tokenizer.model")
    (tmp_path / "a.jsonl").write_bytes(jsonl([*TEXTS, "</s> is text"]))
    sidecar = run(model, tmp_path, tmp_path / "a.jsonl", task_bytes=100, workers=2)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [[[*library.encode(text), library.eos_id()]] for text in [*TEXTS, "</s> is text"]]
    assert read_megatron(tmp_path / "out").documents == expected
    assert (sidecar.eod_token, sidecar.vocab_size) == ("</s>", library.get_piece_size())


def test_tiktoken_file(tmp_path):
    (tmp_path / "tk").mkdir()
    file = tmp_path / "tk" / "tiny.tiktoken"
    description = write_tiny_tiktoken(file)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*TEXTS, "<|endoftext|> is text"]))
    run(file, tmp_path, tmp_path / "a.jsonl", task_bytes=100, workers=2)
    library = tiktoken.Encoding(
        "tiny",
        pat_str=description["pattern"],
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(file)),
        special_tokens=description["special_tokens"],
    )
    expected = [[[*library.encode_ordinary(text), library.eot_token]] for text in [*TEXTS, "<|endoftext|> is text"]]
    assert read_megatron(tmp_path / "out").documents == expected


def test_special_tokens_are_control_tokens_where_that_is_allowed(tmp_path, tiny_tokenizer):
    texts = ["a<|endoftext|>b", "<|im_end|>"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", allow_special_tokens=True)
    library = AutoTokenizer.from_pretrained(tiny_tokenizer)
    expected = [[[*library.encode(text, add_special_tokens=False), 0]] for text in texts]
    assert expected[0][0].count(0) == 2
    assert read_megatron(tmp_path / "out").documents == expected


def test_a_difference_of_the_fast_tokenizer_makes_the_run_go_on_with_the_reference(
    tmp_path, tiny_tokenizer, monkeypatch, capsys
):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 8))
    real, encoders = pipeline.run_tasks, []

    def first_differs(tasks, workers, tokenizer, settings, *rest):
        encoders.append(settings.tokenizer.backend)
        if len(encoders) == 1:
            yield next(real(tasks, workers, tokenizer, settings, *rest))
            raise FastPathError("fastokens gave other ids than tokenizers for 'x'")
        yield from real(tasks, workers, tokenizer, settings, *rest)

    monkeypatch.setattr(pipeline, "run_tasks", first_differs)
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", task_bytes=2000)
    assert encoders == ["auto", "reference"]
    assert "other ids than tokenizers for 'x'; continuing with the reference tokenizer" in capsys.readouterr().err
    assert found.encoder.startswith("tokenizers ")
    assert read_megatron(tmp_path / "out").documents == plain_ids(tiny_tokenizer, TEXTS * 8)


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% endfor %}"
)


def test_conversations_and_their_mask(tmp_path, tiny_tokenizer):
    """The ids are those of transformers' chat template; the mask is 1 on the assistant's words and their end."""
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (tmp_path / "chat.jinja").write_text(plain)
    chats = [
        [{"role": "user", "content": TEXTS[n]}, {"role": "assistant", "content": TEXTS[n + 1]}] for n in range(0, 18, 2)
    ]
    with open(tmp_path / "a.jsonl", "w") as file:
        for number, messages in enumerate(chats):
            if number % 3 == 0:
                record = {"messages": messages}
            elif number % 3 == 1:
                human, machine = (m["content"] for m in messages)
                record = {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": machine}]}
            else:
                record = {"instruction": messages[0]["content"], "output": messages[1]["content"]}
            file.write(json.dumps(record) + "\n")
    options = {"chat": True, "chat_template": str(tmp_path / "chat.jinja"), "task_bytes": 200, "workers": 2}
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    library = AutoTokenizer.from_pretrained(tiny_tokenizer)
    dataset = IndexedDataset(tmp_path / "out")
    documents = read_megatron(tmp_path / "out").documents
    start = 0
    for (ids,), messages in zip(documents, chats, strict=True):
        text = library.apply_chat_template(messages, chat_template=plain, tokenize=False)
        assert library.decode(ids[:-1]) == text and ids[-1] == 0
        mask = dataset.loss_mask(start, start + len(ids))
        trained = library.decode(np.array(ids)[np.asarray(mask, bool)])
        assert trained.removesuffix("<|endoftext|>").rstrip("\n") == messages[1]["content"] + "<|im_end|>"
        start += len(ids)
    assert sidecar.mask_xxh3_128


def test_a_conversation_that_is_none_is_named(tmp_path, refused):
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    arguments = ("--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "out", "--chat")
    assert refused(*arguments, "--chat-template", tmp_path / "chat.jinja").startswith(f"error: {tmp_path}/a.jsonl:1: ")
    assert "chat template" in refused(*arguments)


def test_a_date_in_the_chat_template_is_the_same_in_all_workers(tmp_path, tiny_tokenizer):
    (tmp_path / "chat.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}"
        "{% endfor %}"
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(chat)}\n" * 40)
    options = {"chat": True, "chat_template": str(tmp_path / "chat.jinja"), "chat_date": "2024-02-29"}
    sidecar = run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", task_bytes=100, workers=2, **options)
    texts = {
        AutoTokenizer.from_pretrained(tiny_tokenizer).decode(ids)
        for (ids,) in read_megatron(tmp_path / "out").documents
    }
    assert texts == {"29 Feb 2024<user>a<|im_end|><assistant>b<|im_end|><|endoftext|>"}
    assert sidecar.options["chat_date"] == "2024-02-29"
    sidecar = run(tiny_tokenizer, tmp_path / "today", tmp_path / "a.jsonl", **{**options, "chat_date": None})
    assert len(sidecar.options["chat_date"]) == 10


def test_turns_that_do_not_fit_are_counted_beside_documents(tmp_path, tiny_tokenizer):
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    turns = [{"role": role, "content": "a b c"} for _ in range(6) for role in ("user", "assistant")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = {"chat": True, "chat_template": str(tmp_path / "chat.jinja"), "max_tokens": 60}
    found = report(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", **options)
    (sidecar,) = found.sidecars.values()
    kept = AutoTokenizer.from_pretrained(tiny_tokenizer).decode(read_megatron(tmp_path / "out").documents[0][0])
    assert sidecar.tokens <= 60
    assert sidecar.left_out == {"turns beyond --max-tokens": 12 - kept.count("a b c")}
    assert "left out                   0" in format_report(found)


@pytest.mark.parametrize(
    "option", [{"min_chars": 5}, {"normalize": "nfc"}, {"strip_control": True}, {"held_out": ["x"]}]
)
def test_options_for_texts_are_refused_with_chat(tmp_path, tiny_tokenizer, option):
    with pytest.raises(ValueError, match="is for texts, not for --chat"):
        run(tiny_tokenizer, tmp_path, tmp_path / "a.jsonl", chat=True, **option)


def test_a_text_that_tiktoken_gives_up_on_is_refused_or_skipped_by_itself(tmp_path):
    """Its regular expressions run out of stack on a long row of spaces."""
    (tmp_path / "tk").mkdir()
    write_tiny_tiktoken(tmp_path / "tk" / "tiny.tiktoken")
    texts = ["one", " " * 2_000_000, "two"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    with pytest.raises(ValueError, match=r"a\.jsonl: .*; fix it, or leave such records out with --skip-bad-lines"):
        run(tmp_path / "tk", tmp_path, tmp_path / "a.jsonl")
    sidecar = run(tmp_path / "tk", tmp_path, tmp_path / "a.jsonl", skip_bad_lines=True)
    assert (sidecar.documents, sidecar.left_out) == (2, {"malformed": 1})
