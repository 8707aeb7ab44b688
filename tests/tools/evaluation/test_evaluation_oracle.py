"""Losses and bits per byte equal those of a plain loop of transformers over single documents, in float32."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from evaluating import FP32, evaluate, request, save_model, texts, write_dataset, write_jsonl
from oracles.tiny_tokenizer import train_tiny_sentencepiece
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from retemper.engine.errors import UserError
from retemper.engine.weights.conversion import hf_to_dcp

DOCUMENTS = texts(12)


class Document(NamedTuple):
    """A document as a library encodes it."""

    ids: list[int]
    """With what precedes and ends the text."""
    num_bytes: int
    """UTF-8 bytes of the text that is predicted."""
    ends: int
    """Tokens without text at the end."""


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model with byte pieces, whose documents begin with a BOS."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tiny_sentencepiece(folder / "tokenizer.model")
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Datasets made from text are shared by these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETEMPER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", DOCUMENTS)


def byte_level(folder: Path) -> list[Document]:
    """Without a BOS the first token is not predicted: by the offsets of the tokenizers library."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    found = []
    for text in DOCUMENTS:
        encoding = tokenizer.encode(text)
        predicted = text[encoding.offsets[0][1] :]
        found.append(Document([*encoding.ids, end], len(predicted.encode()), 1))
    return found


def sentencepiece(folder: Path) -> list[Document]:
    """After a BOS all of the text is predicted: by what the library decodes."""
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = []
    for text in DOCUMENTS:
        ids = model.encode(text)
        found.append(Document([model.bos_id(), *ids, model.eos_id()], len(model.decode(ids).encode()), 1))
    return found


@torch.no_grad()
def losses(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Nats of each token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


CASES = [("qwen2", "bytes"), ("gemma2", "sentencepiece"), ("qwen2", "pieces")]
MIXTURES = [("olmoe", "bytes"), ("qwen2_moe", "bytes"), ("glm4_moe", "bytes")]


@pytest.mark.parametrize(("model_type", "kind"), CASES + MIXTURES)
def test_a_plain_loop_over_documents(
    model_type: str, kind: str, one_rank, corpus: Path, tiny_tokenizer: Path, sentencepiece_folder: Path, tmp_path: Path
) -> None:
    tokenizer, read = (tiny_tokenizer, byte_level) if kind == "bytes" else (sentencepiece_folder, sentencepiece)
    folder = save_model(tmp_path / "model", model_type, tokenizer)
    options = request(folder, f"corpus={corpus}", mode="sliding", sequence_length=256, batch_size=2)
    result = evaluate(one_rank, options)
    [score] = result.model.sets

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    documents = read(folder)
    nats = [losses(model, one.ids) for one in documents]
    expected = sum(part.sum().item() for part in nats) / sum(len(part) for part in nats)
    of_text = sum(part[: len(part) - one.ends].sum().item() for part, one in zip(nats, documents, strict=True))
    num_bytes = sum(one.num_bytes for one in documents)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert score.text_bytes == num_bytes
    assert score.bits_per_byte == pytest.approx(of_text / num_bytes / math.log(2), rel=1e-5)
    assert score.targets == sum(map(len, nats)) and score.documents == len(documents)
    means = [part.mean().item() for part in nats]
    assert [one.index for one in score.highest] == sorted(range(len(means)), key=lambda at: -means[at])[:3]
    assert [one.index for one in score.lowest] == sorted(range(len(means)), key=lambda at: means[at])[:3]
    assert score.lowest[0].loss == pytest.approx(min(means), rel=1e-5)
    beginning = DOCUMENTS[score.lowest[0].index].split()
    assert score.lowest[0].beginning.split()[:5] == beginning[:5]


def test_windows_that_slide(one_rank, tiny_tokenizer: Path, tmp_path: Path) -> None:
    """A loop as in transformers' guide to perplexity: every token is predicted once, in a window that ends at it or up
    to a stride later."""
    folder = save_model(tmp_path / "model", "qwen2", tiny_tokenizer)
    documents = [one.ids for one in byte_level(folder)]
    prefix = write_dataset(tmp_path / "data", documents)
    length, stride = 32, 12
    options = request(folder, prefix, mode="sliding", sequence_length=length, stride=stride, batch_size=1)
    [score] = evaluate(one_rank, options).model.sets

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for ids in documents:
        end = min(len(ids) - 1, length)  # last input of the first window
        scored = losses(model, ids[: end + 1])
        total, count = total + scored.sum().item(), count + len(scored)
        while end < len(ids) - 1:
            former, end = end, min(len(ids) - 1, end + stride)
            scored = losses(model, ids[end - length : end + 1])[-(end - former) :]
            total, count = total + scored.sum().item(), count + len(scored)
    assert score.targets == count == sum(len(ids) - 1 for ids in documents)
    assert score.loss == pytest.approx(total / count, rel=1e-5)


def test_a_table_of_positions_limits_windows_and_their_padding(one_rank, tmp_path: Path) -> None:
    """GPT-2 names its length n_positions, has no position behind it, and its config has dropout."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    hf = GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path / "model")
    assert config.resid_pdrop > 0
    documents = [[7, 8, 9], [3, 4, 5, 6, 7]]
    prefix = write_dataset(tmp_path / "data", documents)
    result = evaluate(one_rank, request(tmp_path / "model", prefix, mode="sliding", batch_size=4))
    [score] = result.model.sets
    assert result.settings["sequence_length"] == 32
    assert score.loss == pytest.approx(torch.cat([losses(hf, ids) for ids in documents]).mean().item(), rel=1e-5)


def test_a_checkpoint_and_its_folder_are_the_same(one_rank, tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen2", tiny_tokenizer)
    hf_to_dcp.convert(str(folder), tmp_path / "checkpoint", say=lambda line: None)
    prefix = write_dataset(tmp_path / "data", [one.ids for one in byte_level(folder)])
    result = evaluate(one_rank, request(folder, prefix, baseline=str(tmp_path / "checkpoint"), sequence_length=64))
    assert result.baseline is not None and result.baseline.sets == result.model.sets
    assert [one.verdict for one in result.changes] == ["unchanged"]


def test_bits_per_byte_compare_models_with_other_tokenizers(
    one_rank, corpus: Path, tiny_tokenizer: Path, sentencepiece_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("RETEMPER_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path / "model", "qwen2", tiny_tokenizer)
    other = save_model(tmp_path / "other", "qwen2", sentencepiece_folder, seed=1)
    result = evaluate(one_rank, request(model, corpus, baseline=str(other), sequence_length=64), FP32)
    [change] = result.changes
    # Prepared datasets belong to one of the tokenizers, and are refused for the other model.
    prefixes = [path.with_suffix("") for path in tmp_path.glob("cache/datasets/*/dataset.idx")]
    assert len(prefixes) == 2
    for folder in (model, other):
        refusals = 0
        for prefix in prefixes:
            try:
                [score] = evaluate(one_rank, request(folder, f"corpus={prefix}", sequence_length=64)).model.sets
                assert score.nats == (change.after if folder == model else change.before).nats
            except UserError as error:
                assert "made with tokenizer" in str(error) and str(prefix) in str(error)
                refusals += 1
        assert refusals == 1
    assert not result.same_tokenizer and change.loss is None and change.bits_per_byte is not None
    difference = change.after.bits_per_byte - change.before.bits_per_byte
    assert change.verdict == ("learned" if difference < 0 else "forgotten")
