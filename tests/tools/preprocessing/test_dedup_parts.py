"""Duplicates across the parts of a run: datatrove's stages remove what one machine removes."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracles.preprocessing import jsonl, report
from oracles.tiny_tokenizer import sample_text

from retemper.engine.errors import UserError
from retemper.tools.preprocessing import pipeline
from retemper.tools.preprocessing.dedup.across_parts import kept_documents, signature_shape, write_exclusions
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import preprocess, write_signatures_of_part

NUM_PARTS = 3


def corpus() -> list[str]:
    """Texts of which many have copies and near-copies anywhere, also in chains, and some have no word."""
    draw = random.Random(1)
    texts = []
    for seed in range(12):
        words = sample_text(seed, 120).split()
        texts.append(" ".join(words))
        for _ in range(seed % 4):
            words = [*words[: -2 * seed % 7 or None], f"word{draw.randrange(1000)}"]
            texts.append(" ".join(words))
        texts += [texts[-1]] * (seed % 3)
    texts += ["...", "!!!", "...", "-"]
    draw.shuffle(texts)
    return texts


def datatrove_stages(folder: Path, num_buckets: int, num_hashes: int) -> None:
    """Run datatrove's second and third stage."""
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash", reason="needs datatrove: pip install datatrove")
    hashing = pytest.importorskip("datatrove.utils.hashing")
    config = minhash.MinhashConfig(
        num_buckets=num_buckets, hashes_per_bucket=num_hashes, hash_config=hashing.HashConfig(precision=64)
    )
    signatures, pairs, clusters = (str(folder / name) for name in ("signatures", "pairs", "clusters"))
    buckets = minhash.MinhashDedupBuckets(signatures, pairs, config=config)
    for rank in range(num_buckets):
        buckets.run(None, rank, num_buckets)
    minhash.MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True).run(None, 0, 1)


@pytest.mark.parametrize(
    ("dedup", "more"),
    [
        ("exact", {}),
        ("minhash", {"dedup_threshold": 0.5, "min_tokens": 3, "split": "a=0.5,b=0.5"}),
        pytest.param("minhash", {}, marks=pytest.mark.slow),
        pytest.param("exact", {"min_chars": 4, "split": "a=0.5,b=0.5"}, marks=pytest.mark.slow),
    ],
)
def test_the_parts_are_the_dataset_of_one_machine(tmp_path, tiny_tokenizer, dedup, more, monkeypatch):
    if dedup == "minhash":
        pytest.importorskip("rensa", reason="needs rensa: pip install rensa")
    texts = corpus()
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:20]))
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts[20:]))
    inputs = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    common = {"dedup": dedup, "workers": 1, **more}
    whole = report(tiny_tokenizer, tmp_path, *inputs, encoder="auto", **common)
    assert sum(sidecar.documents for sidecar in whole.sidecars.values()) < len(texts) - 10

    prefix = str(tmp_path / "parts")
    for index in range(NUM_PARTS):
        part = PreprocessOptions(inputs, str(tiny_tokenizer), prefix, shard=f"{index}/{NUM_PARTS}", **common)  # type: ignore[arg-type]
        write_signatures_of_part(replace(part, signatures=str(tmp_path / "signatures")))
        assert not list(tmp_path.glob("parts.shard-*.idx"))
    datatrove_stages(tmp_path, *signature_shape(part))
    write_exclusions(tmp_path / "clusters", tmp_path / "exclusions", NUM_PARTS)
    # The signatures were made from outputs that are used again.
    monkeypatch.setattr(pipeline, "run_here", None)
    monkeypatch.setattr(pipeline, "run_tasks", None)
    for index in range(NUM_PARTS):
        excluded = str(tmp_path / f"exclusions/{index}.documents")
        preprocess(replace(part, shard=f"{index}/{NUM_PARTS}", exclude_documents=excluded))
    assert not list(tmp_path.glob(".parts*"))
    for name in whole.sidecars:
        side = name.removeprefix(str(tmp_path / "out"))
        parts = [f"{prefix}.shard-{index}-of-{NUM_PARTS}{side}" for index in range(NUM_PARTS)]
        merge(MergeOptions(parts, prefix + side))
        for suffix in ("bin", "idx"):
            assert Path(f"{prefix}{side}.{suffix}").read_bytes() == Path(f"{name}.{suffix}").read_bytes()
        assert json.loads(Path(f"{prefix}{side}.json").read_text()) == json.loads(Path(f"{name}.json").read_text())


def test_exclusions_of_other_documents_are_refused(tmp_path):
    np.array([3, 1], "<u4").tofile(tmp_path / "0.documents")
    assert [part.tolist() for part in kept_documents(str(tmp_path / "0.documents"), [2, 0, 2])] == [
        [True, False],
        [],
        [True, False],
    ]
    with pytest.raises(UserError, match="names document 3, but this part has 3; find the duplicates again"):
        list(kept_documents(str(tmp_path / "0.documents"), [1, 2]))
    with pytest.raises(UserError, match="No such file"):
        list(kept_documents(str(tmp_path / "1.documents"), [1]))


def test_the_first_of_each_cluster_is_kept(tmp_path):
    clusters = {0: [(2, 0), (5, 1), (7, 0)], 2: [(0, 1), (1, 2), (3, 2), (9, 3)], 3: [(4, 3)]}
    (tmp_path / "in").mkdir()
    for part, pairs in clusters.items():
        np.array(pairs, "<u4").tofile(tmp_path / "in" / f"{part:06d}.clusters")
    write_exclusions(tmp_path / "in", tmp_path / "out", 5)
    written = [np.fromfile(tmp_path / "out" / f"{part}.documents", "<u4").tolist() for part in range(5)]
    assert written == [[7], [], [0, 3], [4], []]


@pytest.mark.parametrize("option", ["--signatures", "--exclude-documents"])
def test_both_steps_are_for_parts(refused, option, tmp_path):
    line = refused("--input", "a.jsonl", option, str(tmp_path / "x"), "--dedup", "exact")
    assert "is for the parts of a deduplicated corpus; add --shard and --dedup" in line
