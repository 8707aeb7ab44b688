"""The BOS of documents: what the preprocess command writes, records and refuses, and what becomes of it in a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.framed_tokenizers import FAST, KINDS, LLAMA3, QWEN, SENTENCEPIECE, byte_level, save
from oracles.tiny_tokenizer import sample_text
from transformers import AutoTokenizer

from retemper.engine.config.settings import DataConfig, SourceConfig
from retemper.engine.data.catalog import open_catalog
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.packing import pack
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.engine.observe.tokenizer_notes import tokenizer_notes
from retemper.engine.schedule import BatchPlan
from retemper.engine.tokenizer.frame import TokenizerFrame, read_tokenizer_frame
from retemper.kernels.linear_cross_entropy import IGNORE_INDEX
from retemper.tools import preprocess as command
from retemper.tools.preprocessing import pipeline, run_setup
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.readers import lines
from retemper.tools.preprocessing.records import long_text
from retemper.tools.preprocessing.workers.worker import TaskRunner
from retemper.tools.reports.dataset.facts import dataset_facts
from retemper.tools.reports.dataset.report import InspectOptions, inspect_dataset

TEXTS = ["rain fell over the old town", "the cat", sample_text(3, 20)]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "a mat"}]}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tasks done here rather than in processes that take a second to start."""

    def run_tasks(todo: Any, workers: int, tokenizer: Any, settings: Any, progress: Any, on_tick: Any) -> Iterator[Any]:
        runner = TaskRunner(settings, np.frombuffer(progress, dtype=np.int64), settings.tokenizer.load())
        for task, key in todo:
            yield runner.run(task, key)

    monkeypatch.setattr(pipeline, "run_tasks", run_tasks)
    monkeypatch.setattr(run_setup, "start_early", lambda spec: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: make(root / name.replace(" ", "-")) for name, make in KINDS.items()}


def made(
    folder: Path, tokenizer: Path, records: list[Any] | None = None, **options: Any
) -> tuple[list[list[int]], Sidecar]:
    """The documents of a dataset made of ``records`` (by default ``TEXTS``), and its sidecar."""
    folder.mkdir(exist_ok=True)
    records = [{"text": text} for text in TEXTS] if records is None else records
    text = "".join(json.dumps(record) + "\n" for record in records)
    file = folder / f"{hash(text)}.jsonl"
    if not file.exists():
        file.write_text(text)
    prefix = str(folder / options.pop("name", "out"))
    name = None if tokenizer is None else str(tokenizer)
    settings: dict[str, Any] = {"output_prefix": prefix, "overwrite": True, "tokenizer": name, **options}
    (sidecar,) = pipeline.preprocess(PreprocessOptions([str(file)], **settings)).sidecars.values()
    dataset = IndexedDataset(prefix)
    return [dataset[index].tolist() for index in range(len(dataset))], sidecar


@pytest.mark.parametrize("encoder", ["fast", "auto", "reference"])
@pytest.mark.parametrize("name", KINDS)
def test_auto_is_what_transformers_gives_and_one_document_end(tmp_path, folders, name, encoder):
    reference = AutoTokenizer.from_pretrained(folders[name])
    # Of a Unigram model the end of documents could be made of text, which is refused otherwise.
    documents, sidecar = made(tmp_path, folders[name], encoder=encoder, allow_special_tokens=name == "t5")
    expected = [reference(text)["input_ids"] for text in TEXTS]
    # The end is not written twice where the tokenizer has written it.
    ends = [[] if ids[-1] == sidecar.eod_id else [sidecar.eod_id] for ids in expected]
    assert documents == [[*ids, *end] for ids, end in zip(expected, ends, strict=True)]
    bare = [reference(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    front, behind = len(sidecar.bos_ids or ()), len(sidecar.eos_ids or ())
    assert [ids[front : len(ids) - behind - 1] for ids in documents] == bare
    assert all(tuple(ids[:front]) == sidecar.bos_ids for ids in documents)
    assert sidecar.bos_token == (" ".join(reference.convert_ids_to_tokens(sidecar.bos_ids)) or None)


def test_yes_no_and_no_end(tmp_path, folders):
    llama = folders["llama 3"]
    with_bos, sidecar = made(tmp_path, llama)
    assert sidecar.bos_ids == (0,) and made(tmp_path, llama, bos="yes") == (with_bos, sidecar)
    without, sidecar = made(tmp_path, llama, bos="no")
    assert without == [ids[1:] for ids in with_bos] and (sidecar.bos_token, sidecar.bos_ids) == (None, ())
    assert made(tmp_path, llama, append_eod=False)[0] == [ids[:-1] for ids in with_bos]
    gpt2 = made(tmp_path, folders["gpt-2"], bos="yes")[0]
    assert gpt2 == [[0, *ids] for ids in made(tmp_path, folders["gpt-2"])[0]]
    # Without its end a text has none of the tokenizer's either.
    bare = made(tmp_path, folders["both sides"], append_eod=False)[0]
    assert bare == [ids[:-1] for ids in made(tmp_path, folders["both sides"])[0]]
    with pytest.raises(UserError, match="--bos yes: the tokenizer has no BOS"):
        made(tmp_path / "none", folders["qwen 2"], bos="yes")
    assert not list((tmp_path / "none").glob("out*"))


def test_never_twice_where_the_text_writes_it(tmp_path, folders):
    texts = ["<|begin_of_text|>the cat", "the cat", "<|begin_of_text|><|begin_of_text|>a", "the cat<|end_of_text|>"]
    records = [{"text": text} for text in texts]
    documents, _ = made(tmp_path, folders["llama 3"], records, allow_special_tokens=True)
    cat = documents[1][1:-1]
    assert documents[0] == documents[1] == documents[3] == [0, *cat, 1]
    assert documents[2][:3].count(0) == 2  # what a text says is not taken away
    # As text it is no BOS.
    documents, _ = made(tmp_path, folders["llama 3"], records)
    assert [ids.count(0) for ids in documents] == [1, 1, 1, 1] and all(ids[0] == 0 for ids in documents)


def test_limits_count_it_and_empty_texts_do_not_get_it(tmp_path, folders):
    records = [{"text": "the cat"}, {"text": ""}, {"text": "the cat sat"}]
    (short, long), sidecar = made(tmp_path, folders["llama 3"], records)
    assert sidecar.left_out == {"empty": 1}
    assert made(tmp_path, folders["llama 3"], records, max_tokens=len(short))[0] == [short]
    assert made(tmp_path, folders["llama 3"], records, min_tokens=len(short) + 1)[0] == [long]


def test_a_long_text_gets_one(tmp_path, folders, monkeypatch):
    text = "\n".join(sample_text(seed, 60).replace("\n", " ") for seed in range(60))
    texts = [{"text": text}, {"text": "a cat"}, {"text": "<|begin_of_text|>" + text + "<|end_of_text|>"}]
    whole = [made(tmp_path, folders["llama 3"], texts, allow_special_tokens=allow)[0] for allow in (False, True)]
    for module in (long_text, lines):
        monkeypatch.setattr(module, "LONG_BYTES", 4000)
    monkeypatch.setattr(long_text, "_LONG_STRING", 1000)
    monkeypatch.setattr(long_text, "_PIECE_BYTES", 2000)
    seen = []
    monkeypatch.setattr(
        TaskRunner, "_write_long", lambda self, *given, _write=TaskRunner._write_long: seen.append(_write(self, *given))
    )
    pieces = [made(tmp_path, folders["llama 3"], texts, allow_special_tokens=allow)[0] for allow in (False, True)]
    assert len(seen) == 4 and pieces == whole
    assert whole[1][0] == whole[1][2] and whole[1][0].count(0) == 1


def test_another_bos_makes_other_shards(tmp_path, folders, monkeypatch):
    """What an interrupted run left is taken up by a run with the same BOS alone."""
    monkeypatch.setattr(pipeline, "publish", lambda *_: (_ for _ in ()).throw(UserError("interrupted")))
    keys = []
    tokenize = pipeline.tokenize
    monkeypatch.setattr(pipeline, "tokenize", lambda plan: (keys.append([*plan.tasks]), tokenize(plan))[1])
    for bos in ("auto", "yes", "no"):
        with pytest.raises(UserError, match="interrupted"):
            made(tmp_path, folders["llama 3"], bos=bos)
    auto, yes, no = keys
    assert auto == yes != no


class TestChat:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "chat_template": TEMPLATE}
        tokens = (*LLAMA3, "<|im_start|>", "<|im_end|>")
        return save(tmp_path / "t", byte_level(tokens), "<|begin_of_text|> $A", tokenizer_class=FAST, **names)

    @pytest.mark.parametrize("writes", [False, True])
    def test_template_decides_and_bos_changes_it_once(self, tmp_path, folder, writes):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = "{{ bos_token }}" * writes + TEMPLATE
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        reference = AutoTokenizer.from_pretrained(folder)
        theirs = reference.apply_chat_template(CHAT["messages"], return_dict=False)
        assert (theirs[0] == 0) is writes
        bare = theirs[writes:]
        expected = {"auto": [*theirs, 1], "yes": [0, *bare, 1], "no": [*bare, 1]}
        masks = []
        for bos, ids in expected.items():
            (document,), sidecar = made(tmp_path, folder, [CHAT], chat=True, bos=bos)
            assert document == ids and sidecar.bos_ids == ((0,) if ids[0] == 0 else ()), bos
            dataset = IndexedDataset(tmp_path / "out")
            mask = dataset.loss_mask(0, len(ids)).tolist()  # type: ignore[union-attr]
            masks.append(mask[ids[0] == 0 :])
            assert not mask[0]
            # Exactly what fits is kept.
            assert made(tmp_path, folder, [CHAT], chat=True, bos=bos, max_tokens=len(ids))[0] == [ids]
            with pytest.raises(UserError, match="no whole turn fits"):
                made(tmp_path, folder, [CHAT], chat=True, bos=bos, max_tokens=len(ids) - 1)
        assert masks[0] == masks[1] == masks[2] and any(masks[0])


class TestModel:
    def test_its_tokenizer_is_used(self, tmp_path, folders, capsys):
        model = Path(shutil.copytree(folders["llama 3"], tmp_path / "model"))
        (model / "config.json").write_text('{"vocab_size": 331, "bos_token_id": 0}')
        expected, _ = made(tmp_path, model)
        for folder in (model, tmp_path / "checkpoint"):
            if folder != model:
                shutil.copytree(model, folder / "hf")
            documents, sidecar = made(tmp_path, tokenizer=None, model=str(folder))
            assert documents == expected and sidecar.tokenizer.startswith(str(folder))
        assert "note" not in capsys.readouterr().err
        (model / "config.json").write_text('{"vocab_size": 300}')
        made(tmp_path, tokenizer=None, model=str(model))
        assert "note: the tokenizer has ids up to 329, but the model's vocab_size is 300" in capsys.readouterr().err

    def test_what_is_refused(self, tmp_path, folders):
        qwen = Path(shutil.copytree(folders["qwen 2"], tmp_path / "qwen"))
        (qwen / "config.json").write_text('{"vocab_size": 100, "bos_token_id": 322}')
        for arguments, message in (
            ({"model": str(qwen), "tokenizer": "x"}, "--tokenizer x and --model .* both name a tokenizer"),
            ({"model": str(folders["qwen 2"])}, "no config.json in"),
            ({"model": str(qwen / "config.json")}, "not a folder"),
            ({"model": str(qwen), "bos": "yes"}, r"\(322\) is outside the model's vocabulary of 100"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                made(tmp_path, **{"tokenizer": None, **arguments})
            assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))

    def test_without_both_qwens_is_announced(self, monkeypatch, capsys, tmp_path, folders):
        asked = []

        def find(name: str) -> Path:
            asked.append(capsys.readouterr().err)
            return folders["qwen 2"] / "tokenizer.json"

        monkeypatch.setattr(run_setup, "find_tokenizer_file", find)
        made(tmp_path, tokenizer=None)
        assert asked[0].startswith("note: neither --model nor --tokenizer is given") and "Qwen/Qwen2-72B" in asked[0]


def test_the_command_says_it(tmp_path, folders, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(folders["llama 3"])]
    command.main([*arguments, "--output-prefix", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert "documents begin with <|begin_of_text|> (0) and end with <|end_of_text|> (1)" in err
    assert "document begin   <|begin_of_text|> (0)\n" in out
    facts = dataset_facts(inspect_dataset(InspectOptions(str(tmp_path / "out"))))
    assert facts["document begin"] == "<|begin_of_text|> (0)"


def test_datasets_that_begin_differently_are_not_merged(tmp_path, folders):
    made(tmp_path, folders["llama 3"], name="a")
    made(tmp_path, folders["llama 3"], name="b", bos="no")
    made(tmp_path, folders["llama 3"], name="c", bos="no")
    inputs = [str(tmp_path / name) for name in "abc"]
    with pytest.raises(UserError, match=r"bos_ids is \[\], but of .* it is \[0\].*preprocess both with .* --bos"):
        merge(MergeOptions(inputs[:2], str(tmp_path / "ab")))
    # One made before the BOS was recorded has none.
    record = json.loads((tmp_path / "c.json").read_text())
    for name in ("bos_token", "bos_ids", "eos_ids"):
        del record[name]
    (tmp_path / "c.json").write_text(json.dumps(record))
    old = Sidecar.read(tmp_path / "c")
    assert old is not None and old.bos_ids is None
    merge(MergeOptions(inputs[1:], str(tmp_path / "bc")))
    (tmp_path / "c.json").write_text(json.dumps({**record, "bos_ids": ["x"]}))
    with pytest.raises(UserError, match=r"bos_ids is \['x'\], not a list of token ids"):
        Sidecar.read(tmp_path / "c")


class TestTraining:
    PLAN = BatchPlan(16, global_batch_size=1, micro_batch_size=1, data_parallel_size=1)

    @pytest.mark.parametrize("packing", ["concat", "best_fit"])
    @pytest.mark.parametrize("shuffle", ["windows", "documents"])
    @pytest.mark.parametrize("masked", [False, True])
    def test_it_is_never_a_target(self, tmp_path, packing, shuffle, masked):
        """Nor behind the document before it, where documents see each other; all else stays a target."""
        documents = [[0, *range(10 * n, 11 * n), 1] for n in (1, 2, 3, 1, 2, 5, 1, 2, 3, 4, 1, 2)]
        for name, bos_ids in (("with", (0,)), ("unknown", None)):
            with IndexedDatasetWriter(tmp_path / name, np.uint16, mask=masked) as writer:
                writer.add_documents(
                    np.concatenate(documents),
                    [*map(len, documents)],
                    mask=np.ones(sum(map(len, documents)), np.uint8) if masked else None,
                )
                writer.sidecar = Sidecar("t", "a" * 64, 100, True, "e", 1, (), {}, bos_token="b", bos_ids=bos_ids)
        pairs: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        for name in ("with", "unknown"):
            config = DataConfig([SourceConfig(str(tmp_path / name))], packing=packing, shuffle=shuffle)
            (source,) = open_catalog(config, self.PLAN, 100, None, 7).train
            source = replace(source, name="same")
            chunks = [source.chunk(index, 100) for index in range(source.num_chunks)]
            for across in (False, True):
                batch = pack(chunks, 16, across)
                pairs[name, across] = [
                    (a, b)
                    for a, b in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
                    if b != IGNORE_INDEX
                ]
                assert batch.num_targets == len(pairs[name, across])
        assert not [pair for pair in pairs["with", True] if pair[1] == 0]
        assert not [pair for pair in pairs["with", False] if pair[1] == 0]
        assert [pair for pair in pairs["unknown", True] if pair[1] == 0]
        if (packing, shuffle) == ("concat", "windows"):
            assert pairs["with", True] == [pair for pair in pairs["unknown", True] if pair[1] != 0]
            assert pairs["with", False] == pairs["unknown", False]

    def test_notes(self, tmp_path, folders):
        llama, qwen = (read_tokenizer_frame(folders[name] / "tokenizer.json") for name in ("llama 3", "qwen 2"))

        def notes(names: str, frame: TokenizerFrame | None, has_tokenizer: bool = True) -> list[str]:
            config = DataConfig([SourceConfig(str(tmp_path / name)) for name in names])
            return tokenizer_notes(open_catalog(config, self.PLAN, 500, None, 7), frame, has_tokenizer)

        made(tmp_path, folders["llama 3"], name="w")
        made(tmp_path, folders["llama 3"], name="o", bos="no")
        assert notes("w", llama) == notes("o", qwen) == []
        (line,) = notes("wo", llama)
        assert line.startswith("note: the model's tokenizer begins every text with <|begin_of_text|> (0), but the docu")
        assert f"{tmp_path}/o do not, while those of {tmp_path}/w do" in line
        (line,) = notes("w", qwen)
        assert "begin with <|begin_of_text|> (0), but the model's tokenizer does not" in line
        (line,) = notes("wo", None)
        assert f"of {tmp_path}/w begin with <|begin_of_text|> (0), and those of {tmp_path}/o do not" in line
        # Datasets without a sidecar, or with one that does not say it, are looked at.
        record = json.loads((tmp_path / "w.json").read_text())
        (tmp_path / "o.json").unlink()
        (tmp_path / "w.json").write_text(json.dumps({k: v for k, v in record.items() if not k.startswith("bos_")}))
        assert notes("w", llama) == [] and f"{tmp_path}/o do not" in notes("o", llama)[0]
        made(tmp_path, folders["qwen 2"], name="q")
        (line,) = notes("wq", None, has_tokenizer=False)
        assert "the model has no tokenizer" in line and "different tokenizers" in line


def test_kinds_are_of_every_convention(folders):
    """What the list is for: some with a BOS, some without, some that end texts, some with several tokens in front."""
    frames = [read_tokenizer_frame(next(p for p in folder.glob("tokenizer.[jm]*"))) for folder in folders.values()]
    assert {len(frame.prefix) for frame in frames} == {0, 1, 2} and {len(frame.suffix) for frame in frames} == {0, 1}
    assert len(folders) >= 10 and SENTENCEPIECE and QWEN
