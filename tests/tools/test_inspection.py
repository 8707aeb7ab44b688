"""What show_dataset counts, against slow counting in plain Python; its estimates, against what they estimate."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from oracles.megatron_index import write_megatron
from oracles.tiny_tokenizer import sample_text, train_tiny_sentencepiece, write_tiny_tiktoken
from tokenizers import Tokenizer, models

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError
from retemper.tools.reports.dataset import lengths as lengths_module
from retemper.tools.reports.dataset import token_counts
from retemper.tools.reports.dataset.decoding import decode_document, measure_text, pieces
from retemper.tools.reports.dataset.lengths import LengthCounts, count_lengths, sample_lengths
from retemper.tools.reports.dataset.streams import DatasetStream
from retemper.tools.reports.dataset.token_counts import PassFacts, count_tokens, sample_tokens
from retemper.tools.tokenizer.handle import load_tokenizer

EOD = 0


def made_up_documents(seed: int, count: int) -> list[list[list[int]]]:
    """Documents of some sequences: short and long, empty ones, copies, ends missing and ends inside."""
    draw = random.Random(seed)
    documents: list[list[list[int]]] = []
    for _ in range(count):
        kind = draw.random()
        if kind < 0.3 and documents:
            documents.append(draw.choice(documents))
        elif kind < 0.4:
            documents.append([])
        else:
            parts = [[draw.randint(0, 6) for _ in range(draw.randint(0, 9))] for _ in range(draw.randint(1, 3))]
            documents.append([*parts[:-1], [*parts[-1], EOD]])
    return documents


def write(
    folder: Path, documents: list[list[list[int]]], mask: list[int] | None = None, code: int = 4
) -> IndexedDataset:
    write_megatron(folder / "x", documents, code)
    if mask is not None:
        (folder / "x.mask.bin").write_bytes(bytes(mask))
    return IndexedDataset(folder / "x")


@pytest.mark.parametrize("block_tokens", [1, 7, 50, 1 << 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_pass_counts_what_plain_python_counts(tmp_path, seed, block_tokens):
    documents = made_up_documents(seed, 60)
    flat = [[token for part in document for token in part] for document in documents]
    tokens = [token for document in flat for token in document]
    draw = random.Random(seed)
    mask = [draw.randint(0, 1) for _ in tokens]
    found = count_tokens(write(tmp_path, documents, mask), 6, 3, EOD, block_tokens)

    counts = Counter(tokens)
    assert (found.tokens.tokens, found.tokens.sampled) == (len(tokens), False)
    assert found.tokens.used_ids == len(counts.keys() - {6})
    assert dict(found.tokens.most_frequent) == counts
    assert [count for _, count in found.tokens.most_frequent] == sorted(counts.values(), reverse=True)
    assert (found.tokens.unknown, found.tokens.outside_vocab) == (counts[3], counts[6])
    assert found.tokens.curve == [*enumerate(sorted(counts.values(), reverse=True), 1)]

    assert found.ends is not None and found.mask is not None
    assert found.ends.ended == sum(document[-1:] == [EOD] for document in flat)
    assert found.ends.inside == counts[EOD] - found.ends.ended
    starts = np.cumsum([0, *map(len, flat)])
    assert found.mask.predicted == sum(mask)
    assert found.mask.silent_documents == sum(not any(mask[start:stop]) for start, stop in pairwise(starts))
    require_duplicates(found, flat)


def require_duplicates(found: PassFacts, documents: list[list[int]]) -> None:
    seen: dict[tuple[int, ...], list[int]] = {}
    for number, document in enumerate(documents):
        seen.setdefault(tuple(document), []).append(number)
    copies = len(documents) - len(seen)
    copied = sum(map(len, documents)) - sum(map(len, seen))
    facts = found.duplicates
    assert facts is not None and facts.part == 1 and facts.share_error == 0
    assert (facts.copies, facts.share) == (copies, copies / len(documents))
    assert facts.token_share == pytest.approx(copied / sum(map(len, documents)))
    repeated = {(numbers[0], len(numbers), len(text)) for text, numbers in seen.items() if len(numbers) > 1}
    shown = [(one.document, one.copies, one.tokens) for one in facts.most_repeated]
    assert set(shown) <= repeated and len(shown) == min(10, len(repeated))
    assert [copies for _, copies, _ in shown] == sorted((copies for _, copies, _ in repeated), reverse=True)[:10]


@pytest.mark.parametrize("code", [1, 3, 4, 5, 8])
def test_every_dtype_and_ids_beyond_any_vocabulary(tmp_path, code):
    tokens = [1, 100, 7] if code != 5 else [1, 100, 2**40]
    tokens += [-3] if code in (3, 4, 5) else []
    facts = count_tokens(write(tmp_path, [[tokens]], code=code), 50).tokens
    assert facts.outside_vocab == sum(not 0 <= token < 50 for token in tokens)
    assert facts.outside_any == sum(not 0 <= token < 2**24 for token in tokens)
    assert dict(facts.most_frequent) == {token: 1 for token in tokens if 0 <= token < 2**24}


def test_copies_among_more_documents_than_are_remembered_are_estimated(tmp_path):
    draw = random.Random(5)
    texts = [[draw.randint(1, 10_000) for _ in range(draw.randint(1, 6))] for _ in range(3_000)]
    documents = [[text] for text in texts] + [[draw.choice(texts[:200])] for _ in range(1_000)]
    exact = count_tokens(write(tmp_path, documents)).duplicates
    estimated = count_tokens(IndexedDataset(tmp_path / "x"), block_tokens=2_000, capacity=400).duplicates
    assert exact is not None and estimated is not None
    assert exact.part == 1 > estimated.part and estimated.looked_at < 4_000
    assert 0 < estimated.share_error < 0.05 and 0 < estimated.token_share_error < 0.05
    assert abs(estimated.share - exact.share) < 4 * estimated.share_error
    assert abs(estimated.token_share - exact.token_share) < 4 * estimated.token_share_error
    # All copies of a text are looked at, or none.
    copies = Counter(str(document) for document in documents)
    assert all(one.copies == copies[str(documents[one.document])] for one in estimated.most_repeated)


def test_a_sample_says_so_and_is_as_good_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(token_counts, "SAMPLE_RUNS", 40)
    monkeypatch.setattr(token_counts, "SAMPLE_RUN", 25)
    draw = random.Random(2)
    documents = [[[draw.choice([1, 1, 1, 2, 3]) for _ in range(50)]] for _ in range(400)]
    tokens = [token for [part] in documents for token in part]
    dataset = write(tmp_path, documents, [int(token != 2) for token in tokens])
    facts = sample_tokens(dataset, 4, 3, EOD, read_whole=10)
    assert (facts.tokens.sampled, facts.tokens.tokens) == (True, 1_000)
    assert facts.duplicates is None and facts.ends is None and facts.mask is not None
    assert facts.mask.silent_documents is None
    for share, error, token in (
        (facts.tokens.unknown / 1_000, facts.tokens.unknown_error, 3),
        (1 - facts.mask.share, facts.mask.share_error, 2),
    ):
        # Tokens are independent here: the error of a share p among n is sqrt(p (1 - p) / n).
        true = tokens.count(token) / len(tokens)
        assert error == pytest.approx((true * (1 - true) / 1_000) ** 0.5, rel=0.4)
        assert abs(share - true) < 4 * error
    assert sample_tokens(dataset, 4, 3, EOD) == count_tokens(dataset, 4, 3, EOD)  # small enough to be read whole


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lengths_are_those_of_plain_python(tmp_path, seed):
    documents = made_up_documents(seed, 200)
    lengths = sorted(sum(map(len, document)) for document in documents)
    facts = count_lengths(DatasetStream(write(tmp_path, documents)))
    assert facts is not None and not facts.sampled
    require_lengths(facts, lengths)


def test_lengths_of_any_size():
    draw = random.Random(0)
    lengths = [draw.randint(0, 2 ** draw.randint(0, 33)) for _ in range(500)]
    counts = LengthCounts()
    counts.add(np.array(lengths[:300]))
    counts.add(np.array(lengths[300:]))
    facts = counts.facts(sampled=False)
    assert facts is not None
    require_lengths(facts, sorted(lengths))
    assert LengthCounts().facts(sampled=False) is None


def require_lengths(facts, lengths: list[int]) -> None:
    total = sum(lengths)
    assert (facts.documents, facts.longest, facts.empty) == (len(lengths), lengths[-1], lengths.count(0))
    assert facts.mean == pytest.approx(total / len(lengths))
    for percent, value in facts.percentiles.items():
        assert value == pytest.approx(np.percentile(lengths, percent))
    for bin_ in facts.histogram:
        inside = [length for length in lengths if bin_.first <= length <= bin_.last]
        assert (bin_.documents, bin_.tokens) == (len(inside), sum(inside))
    assert sum(bin_.documents for bin_ in facts.histogram) == len(lengths)
    for length, share in facts.curve:
        assert share == pytest.approx(sum(other for other in lengths if other <= length) / total)
    assert facts.curve[-1] == (lengths[-1], 1.0)


def test_sampled_lengths_say_so(tmp_path, monkeypatch):
    for name, value in (("READ_WHOLE", 10), ("_SAMPLE_RUNS", 16), ("_SAMPLE_RUN", 8)):
        monkeypatch.setattr(lengths_module, name, value)
    draw = random.Random(3)
    documents = [[[1] * draw.randint(1, 100)] for _ in range(1_000)]
    facts = sample_lengths(DatasetStream(write(tmp_path, documents)))
    assert facts is not None and (facts.sampled, facts.documents) == (True, 128)
    assert facts.mean == sum(len(part) for [part] in documents) / 1_000  # known without looking
    assert abs(facts.percentiles[50] - np.median([len(part) for [part] in documents])) < 15


def test_a_damaged_index_is_one_line(tmp_path):
    write(tmp_path, [[[1, 2]], [[3]], [[4, 5]]])
    path = tmp_path / "x.idx"
    content = bytearray(path.read_bytes())
    content[34 + 4 : 34 + 8] = (9).to_bytes(4, "little")  # the length of the second sequence
    path.write_bytes(content)
    with pytest.raises(UserError, match="index is damaged"):
        count_tokens(IndexedDataset(tmp_path / "x"))


# Text


def kinds(folder: Path, tiny: Path) -> list[Path]:
    """A tokenizer of each kind."""
    write_tiny_tiktoken(folder / "t.tiktoken")
    return [tiny, folder / "t.tiktoken", train_tiny_sentencepiece(folder / "s.model")]


def test_pieces_make_the_text(tmp_path, tiny_tokenizer):
    for file in kinds(tmp_path, tiny_tokenizer):
        tokenizer = load_tokenizer(file)
        for seed in range(20):
            ids = tokenizer.reference_encode([sample_text(seed, 20) + "\ufffd end 🙂"])[0].tolist()
            found = pieces(tokenizer, ids)
            assert "".join(piece.text for piece in found) == tokenizer.decode(ids)
            assert [token for piece in found for token in piece.tokens] == ids


def test_replacement_characters_are_told_from_broken_bytes(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    encode = lambda text: tokenizer.reference_encode([text])[0].tolist()  # noqa: E731
    replaced = encode("the cat \ufffd, \ufffd\ufffd")
    broken = encode("rain ")[:-1] + encode("𐍈")[:-1] + encode(" mat")
    sound = encode("naïve 天色如洗 🙂 𐍈")
    facts = measure_text(write(tmp_path, [[replaced], [broken], [sound], [[5_000]]]), tokenizer, None, None, 0)
    assert (facts.documents, facts.foreign_documents, facts.all_documents) == (3, 1, False)
    assert (facts.replaced_documents, facts.broken_documents) == (1, 1)
    # U+FFFD is EF BF BD: the ids that the three of them are made of.
    assert facts.replaced_tokens == len(encode("\ufffd")) + len(encode("\ufffd\ufffd"))
    assert 0 < facts.broken_tokens <= len(encode("𐍈")) + 1
    assert facts.tokens == len(replaced) + len(broken) + len(sound)


def test_the_unknown_token_of_each_kind(tmp_path, tiny_tokenizer):
    whole = [*kinds(tmp_path, tiny_tokenizer)]
    plain = load_tokenizer(train_tiny_sentencepiece(tmp_path / "u.model", byte_fallback=False, vocab_size=150))
    assert [load_tokenizer(file).unknown_id for file in whole[:2]] == [None, None]
    unknown = plain.unknown_id
    assert unknown == 0
    ids = plain.reference_encode(["the ☃ cat ☃☃"])[0].tolist()
    facts = count_tokens(write(tmp_path, [[ids]]), plain.vocab_size, unknown)
    assert facts.tokens.unknown == 2  # the library makes one of neighbours


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.BPE({"a": 0, "?": 1}, [], unk_token="?"), 1),
        (models.BPE({"a": 0, "?": 1}, []), None),
        (models.BPE({"a": 0}, [], unk_token="?"), None),
        (models.WordLevel({"a": 0, "[U]": 1, "b": 2}, unk_token="[U]"), 1),
        (models.Unigram([("a", -1.0), ("b", -2.0), ("?", 0.0)], unk_id=2), 2),
        (models.Unigram([("a", -1.0), ("b", -2.0)]), None),
    ],
)
def test_the_unknown_token_of_a_tokenizer_json(tmp_path, model, expected):
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").unknown_id == expected


def test_decoded_documents_mark_the_mask_and_their_ends(tmp_path, tiny_tokenizer):
    tokenizer = load_tokenizer(tiny_tokenizer)
    end = tokenizer.eod()[1]
    first, second = (tokenizer.reference_encode([text])[0].tolist() for text in ("龘 the cat", " sat 🙂"))
    dataset = write(
        tmp_path, [[first, [*second, end]], [first]], [0] * len(first) + [1] * (len(second) + 1) + [1] * len(first)
    )
    whole = decode_document(dataset, tokenizer, 0, 1_000, end)
    assert whole.text == "龘 the cat sat 🙂<|endoftext|>"
    assert "".join(piece.text for piece in whole.pieces if not piece.trained) == "龘 the cat"
    assert (whole.tokens, whole.sequences, whole.ends_with_eod) == (len(first) + len(second) + 1, 2, True)
    assert decode_document(dataset, tokenizer, 1, 1_000, end).ends_with_eod is False
    cut = decode_document(dataset, tokenizer, 1, 1, end)
    assert (cut.shown, cut.text) == (1, "")  # a part of a character is no broken character
    with pytest.raises(UserError, match="has documents 0 to 1"):
        decode_document(dataset, tokenizer, 2, 10, end)
