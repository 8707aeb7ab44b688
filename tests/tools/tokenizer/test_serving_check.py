"""Tokenizer classes of transformers that build rules of their own, with AutoTokenizer as the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess
from retemper.tools.tokenizer import serving_check
from retemper.tools.tokenizer.handle import load_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = [
    *("Hello World", " hello", "hello ", "  two  spaces  ", "\n\nline\n", "12345 x9", "cafe\u0301 A\u030a"),
    *("天色如洗", "हिन्दी עברית", "def f(x):\n    return x\n", "👍🏽 🙂", "I'm DON'T we'Ll", "x", "\t x \n ", "ﬁ"),
]
NFC, GPT2 = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, prefix: bool = False) -> Any:
    """The pre-tokenizer of Qwen2 and Llama 3."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def metaspace(scheme: str) -> Any:
    return pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)


@pytest.fixture(scope="module")
def trained() -> dict[str, str]:
    """A byte-level BPE and one of Llama's kind, as JSON, with tokens of several words' parts."""
    made = {}
    lines = [f"{sample_text(seed, 30)} Hello World  hello return 12345 café" for seed in range(200)]
    for kind in ("bytes", "llama"):
        tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama", fuse_unk=kind == "llama"))
        first: list[str | AddedToken] = ["<|endoftext|>", "<unk>", "<s>", "</s>"]
        if kind == "llama":
            first += [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer.pre_tokenizer = GPT2 if kind == "bytes" else metaspace("first")
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        size = 256 + len(first) + 200
        tokenizer.train_from_iterator(
            lines,
            trainers.BpeTrainer(vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False),
        )
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 4]
        made[kind] = json.dumps(content)
    return made


def write(
    folder: Path, tokenizer: str, normalizer: Any, pre_tokenizer: Any, config: dict[str, Any], **model_config: Any
) -> Path:
    """A folder with tokenizer.json of these rules, tokenizer_config.json, and a config.json where there is any."""
    made = Tokenizer.from_str(tokenizer)
    # The bindings cannot remove a rule.
    content = json.loads(made.to_str())
    for name, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        content[name] = None if part is None else json.loads(part.__getstate__())
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    if model_config:
        (folder / "config.json").write_text(json.dumps(model_config))
    return folder


def served_alike(folder: Path) -> bool:
    """What AutoTokenizer itself says."""
    ours = load_tokenizer(folder, backend="reference")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    return [ids.tolist() for ids in ours.encode_batch(TEXTS)] == expected


LOWER = normalizers.Sequence([NFC, normalizers.Lowercase()])
QWEN, LLAMA = {"tokenizer_class": "Qwen2Tokenizer"}, {"tokenizer_class": "LlamaTokenizer"}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}
OTHERS: dict[str, tuple[Any, ...]] = {
    "Qwen2 and lower case": ("bytes", LOWER, split(QWEN2), QWEN, {}),
    "Qwen2 without NFC": ("bytes", None, split(QWEN2), QWEN, {}),
    "Qwen2 with NFKC": ("bytes", normalizers.NFKC(), split(QWEN2), {"tokenizer_class": "Qwen2TokenizerFast"}, {}),
    "Qwen2 with a prefix space in the file": ("bytes", NFC, split(QWEN2, True), QWEN, {}),
    "Qwen2 with a prefix space in the config": ("bytes", NFC, split(QWEN2), {**QWEN, "add_prefix_space": True}, {}),
    "Qwen2 with the pattern of Llama 3": ("bytes", NFC, split(LLAMA3), QWEN, {}),
    "Qwen2 by model type": ("bytes", NFC, split(LLAMA3), {}, {"model_type": "qwen3"}),
    "Qwen2 whatever is declared": ("bytes", NFC, split(LLAMA3), PLAIN, {"model_type": "qwen2"}),
    "Qwen2 for a file of DeepSeek's": ("bytes", None, split(LLAMA3), LLAMA, {"model_type": "qwen2"}),
    "GPT2 with a prefix space in the file": (
        *("bytes", None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        *({"tokenizer_class": "GPT2Tokenizer"}, {"model_type": "gpt2"}),
    ),
    "GPT2 with a prefix space in the config": (
        *("bytes", None, GPT2, {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, {}),
    ),
    "GPT2 with NFC in the file": ("bytes", NFC, GPT2, {}, {"model_type": "gpt2", "tokenizer_class": "GPT2Tokenizer"}),
    "GPTNeoX without NFC": ("bytes", None, GPT2, {"tokenizer_class": "GPTNeoXTokenizer"}, {}),
    "Llama with Prepend": ("llama", PREPEND, None, {**LLAMA, "legacy": False}, {"model_type": "llama"}),
    "Llama fast with Prepend": ("llama", PREPEND, None, {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, {}),
    "Llama without a prefix space": ("llama", None, metaspace("never"), LLAMA, {}),
    "Gemma with Metaspace": ("llama", None, metaspace("first"), {"tokenizer_class": "GemmaTokenizer"}, {}),
}
ALIKE: dict[str, tuple[Any, ...]] = {
    "Qwen2": ("bytes", NFC, split(QWEN2), QWEN, {"model_type": "qwen2"}),
    "Qwen2 by model type": ("bytes", NFC, split(QWEN2), {}, {"model_type": "qwen3"}),
    "Qwen2 with a prefix space in both": ("bytes", NFC, split(QWEN2, True), {**QWEN, "add_prefix_space": True}, {}),
    "GPT2": ("bytes", None, GPT2, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}, {}),
    "GPTNeoX": ("bytes", NFC, GPT2, {"tokenizer_class": "GPTNeoXTokenizerFast"}, {"model_type": "gpt_neox"}),
    "Llama 3": ("bytes", None, split(LLAMA3), PLAIN, {"model_type": "llama"}),
    "Llama 3 declared as Llama": ("bytes", None, split(LLAMA3), LLAMA, {"model_type": "llama"}),
    "Llama": ("llama", None, metaspace("first"), {**LLAMA, "legacy": False}, {"model_type": "llama"}),
    "Llama legacy": ("llama", None, metaspace("always"), {**LLAMA, "legacy": True}, {}),
    "Llama null": ("llama", None, metaspace("first"), {**LLAMA, "legacy": None, "add_prefix_space": None}, {}),
    "Llama without a prefix space": ("llama", None, metaspace("never"), {**LLAMA, "add_prefix_space": False}, {}),
    "plain with odd rules": ("bytes", LOWER, split(LLAMA3, True), PLAIN, {"model_type": "qwen3"}),
    "tokenizer.json alone": ("bytes", LOWER, GPT2, {}, {}),
    "Gemma": (
        *("llama", normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
        *({"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>"}, {}),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_ids_are_noted(case, trained, tmp_path):
    kind, normalizer, pre_tokenizer, config, model_config = OTHERS[case]
    folder = write(tmp_path / "tk", trained[kind], normalizer, pre_tokenizer, config, **model_config)
    assert not served_alike(folder)
    note = load_tokenizer(folder).serving_note()
    assert note is not None and note.startswith(f"{folder}/tokenizer.json: the text ") and "\n" not in note
    assert ("form C" in note) == (case in ("Qwen2 without NFC", "GPT2 with NFC in the file", "GPTNeoX without NFC"))
    # What the note says to do ends it.
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs.save_pretrained(tmp_path / "saved")
    if model_config:
        (tmp_path / "saved" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load_tokenizer(tmp_path / "saved").serving_note() is None and served_alike(tmp_path / "saved")
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = [plain.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [ids.tolist() for ids in load_tokenizer(folder).encode_batch(TEXTS)] == expected


@pytest.mark.parametrize("case", ALIKE)
def test_ordinary_tokenizers_do_not_import_transformers(case, trained, tmp_path, monkeypatch):
    kind, normalizer, pre_tokenizer, config, model_config = ALIKE[case]
    folder = write(tmp_path / "tk", trained[kind], normalizer, pre_tokenizer, config, **model_config)
    assert served_alike(folder)
    monkeypatch.setattr(serving_check, "auto_tokenizer", lambda folder: pytest.fail("loaded"))
    assert load_tokenizer(folder).serving_note() is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("ignore_merges", True), ("unk_token", "<unk>"), ("end_of_word_suffix", "</w>"), ("byte_fallback", True)],
)
def test_rules_of_the_model_that_a_class_replaces_are_compared(key, value, trained, tmp_path, monkeypatch):
    content = json.loads(trained["bytes"])
    content["model"][key] = value
    folder = write(tmp_path / "tk", json.dumps(content), NFC, split(QWEN2), QWEN)
    asked = []
    monkeypatch.setattr(serving_check, "auto_tokenizer", lambda folder: asked.append(folder) or "not here")
    assert load_tokenizer(folder).serving_note() is None and asked == [folder]


def test_a_class_that_is_not_in_the_table_is_compared(trained, tmp_path):
    folder = write(tmp_path / "tk", trained["bytes"], LOWER, GPT2, {"tokenizer_class": "CohereTokenizer"})
    note = load_tokenizer(folder).serving_note()
    assert note is not None and "CohereTokenizer" in note
    # transformers does not know this one, and takes the file.
    folder = write(tmp_path / "own", trained["bytes"], LOWER, GPT2, {"tokenizer_class": "OwnTokenizer"})
    assert load_tokenizer(folder).serving_note() is None


@pytest.mark.parametrize("kept", [True, False])
def test_sentencepiece_model_that_strips_spaces(kept, tmp_path):
    pytest.importorskip("sentencepiece")
    file = train_tiny_sentencepiece(
        tmp_path / "tk" / "tokenizer.model",
        remove_extra_whitespaces=not kept,
        add_dummy_prefix=not kept,
        normalization_rule_name="identity",
    )
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": not kept}
    (file.parent / "tokenizer_config.json").write_text(json.dumps(config))
    note = load_tokenizer(file.parent).serving_note()
    assert served_alike(file.parent) is kept and (note is None) is kept
    if note is not None:
        assert note.startswith(f"{file}: the text ") and "PreTrainedTokenizerFast" not in note


def test_another_file_of_the_folder_is_not_compared(trained, tmp_path):
    folder = write(tmp_path / "tk", trained["bytes"], LOWER, split(QWEN2), QWEN)
    other = (folder / "tokenizer.json").rename(folder / "mine.json")
    assert load_tokenizer(other).serving_note() is None


def test_preprocess_says_it_once(trained, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "Hello World"}\n' * 3)
    for name, normalizer in (("same", NFC), ("other", LOWER)):
        folder = write(tmp_path / name, trained["bytes"], normalizer, split(QWEN2), QWEN)
        preprocess(
            PreprocessOptions([str(tmp_path / "a.jsonl")], str(folder), str(tmp_path / f"{name}-out"), workers=1)
        )
        notes = [line for line in capsys.readouterr().err.splitlines() if "AutoTokenizer" in line]
        assert len(notes) == (name == "other") and all(note.startswith(f"note: {folder}/") for note in notes)


def test_transformers_is_not_imported(trained, tmp_path):
    folder = write(tmp_path / "tk", trained["bytes"], NFC, split(QWEN2), QWEN, model_type="qwen2")
    code = (
        "import sys; from retemper.tools.tokenizer.handle import load_tokenizer\n"
        f"assert load_tokenizer({str(folder)!r}).serving_note() is None\n"
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
