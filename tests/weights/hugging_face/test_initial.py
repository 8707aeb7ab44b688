"""Runs that start from a Hugging Face folder: the same as from its conversion, and every rank reads its part only."""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import shutil
from pathlib import Path

import hf_starts
import pytest
import tiny_run
import torch
import yaml
from huggingface_hub import errors
from tiny_models import edit_json

from retemper.engine import pretrain
from retemper.engine.config.settings import ModelConfig
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.assets import HfAssets, find_assets
from retemper.engine.weights.conversion import hf_to_dcp
from retemper.engine.weights.hugging_face.hub_download import find_model_folder
from retemper.engine.weights.hugging_face.initial import load_hf_tensors
from retemper.engine.weights.hugging_face.model import open_hf_model
from retemper.tools.planning.options import read_architecture

LAYOUTS = {
    "one rank": (1, []),
    "bf16 weights": (1, ["--training.weight_dtype", "bf16"]),
    "shard 2": (2, []),
    "tensor 2": (2, ["--parallel.tensor", "2"]),
    "pipeline 2": (2, ["--parallel.pipeline", "2"]),
    "shard 2 x tensor 2": (4, ["--parallel.tensor", "2"]),
    "replicate 2 x shard 2": (4, ["--parallel.replicate", "2", "--training.micro_batch_size", "2"]),
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A folder of bfloat16 weights in several files."""
    return hf_starts.save_model(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def hf_run(run_file, hf, tmp_path_factory):
    """A configuration that starts from the folder."""
    config = yaml.safe_load(run_file.read_text())
    config["model"] = {"initialize_from": str(hf)}
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@pytest.fixture
def on_ranks(one_rank, request):
    """Runs a function on 1, 2 or 4 ranks; returns what each returned."""

    def run(world_size, function, *arguments):
        if world_size == 1:
            return [function(one_rank, *arguments)]
        return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size]).run(function, *arguments)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_folders_values_and_reads_no_others(layout, on_ranks, hf_run, hf, tmp_path):
    world_size, overrides = LAYOUTS[layout]
    results = on_ranks(world_size, hf_starts.start, hf_run, ["--run_folder", str(tmp_path), *overrides])
    there, dtype = hf_starts.tensors_in(hf), torch.bfloat16 if layout == "bf16 weights" else torch.float32
    assert set(there) == {name for result in results for name in result["weights"]}
    for rank, result in enumerate(results):
        for name, weight in result["weights"].items():
            assert weight.dtype == dtype and torch.equal(weight, there[name].to(dtype)), (rank, name)
        assert result["read"] == 2 * sum(result["elements"].values()) > 0, rank
        assert result["casts"] == []
    whole = 2 * sum(tensor.numel() for tensor in there.values())
    copies = 2 if "replicate" in layout else 1
    # Ranks that share matrices each have all norms.
    norms = 2 * sum(tensor.numel() for name, tensor in there.items() if "norm" in name)
    assert sum(result["read"] for result in results) == copies * (whole + ("tensor" in layout) * norms)


def test_a_run_from_the_folder_is_the_run_from_its_conversion(one_rank, hf_run, hf, tmp_path):
    hf = shutil.copytree(hf, tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    del config["dtype"]  # which is then declared as it is
    (hf / "config.json").write_text(json.dumps(config))
    hf_to_dcp.convert(str(hf), tmp_path / "converted", say=lambda line: None)
    for name, source in (("direct", hf), ("converted_run", tmp_path / "converted")):
        options = ["--run_folder", str(tmp_path / name), "--model.initialize_from", str(source)]
        tiny_run.train(one_rank, hf_run, [*options, "--training.train_tokens", str(4 * 8 * 32)])
    direct, converted = (tmp_path / name / "checkpoints/step-00000004" for name in ("direct", "converted_run"))
    ours, theirs = tiny_run.tensors_of(direct), tiny_run.tensors_of(converted)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert HfAssets.of_checkpoint(direct).files == HfAssets.of_checkpoint(converted).files
    assert json.loads(HfAssets.of_checkpoint(direct).files["config.json"])["torch_dtype"] == "bfloat16"
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(HfAssets.of_checkpoint(direct).files)
    manifest = json.loads((direct / "manifest.json").read_text())
    assert manifest["config"]["model"]["initialize_from"] == str(hf)


def test_a_run_that_resumes_does_not_look_at_the_folder_again(one_rank, hf_run, hf, tmp_path):
    source = shutil.copytree(hf, tmp_path / "hf")
    options = ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", str(source)]
    tiny_run.train(one_rank, hf_run, [*options, "--training.train_tokens", str(4 * 8 * 32)])
    before = tiny_run.tensors_of(tmp_path / "run/checkpoints/step-00000004")
    shutil.rmtree(source)
    run = pretrain.build(tiny_run.configure(hf_run, *options), one_rank)
    assert run.progress.step == 4
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_weights_that_are_rounded_are_spoken_of(one_rank, hf_run, tmp_path):
    wide = hf_starts.save_model(tmp_path / "wide", torch.float32)
    options = ["--model.initialize_from", str(wide), "--training.weight_dtype", "bf16"]
    result = hf_starts.start(one_rank, hf_run, ["--run_folder", str(tmp_path / "run"), *options])
    count = len(result["weights"])
    assert result["casts"] == [f"dtypes      {count} tensors of {wide} cast from float32 to bfloat16"]
    there = hf_starts.tensors_in(wide)
    assert all(torch.equal(weight, there[name].bfloat16()) for name, weight in result["weights"].items())


def test_files_of_an_earlier_save_are_left_out_and_named(one_rank, hf_run, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    (folder / "stale.safetensors").write_bytes(b"no safetensors file at all")
    result = hf_starts.start(
        one_rank, hf_run, ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", str(folder)]
    )
    assert len(result["casts"]) == 1 and "stale.safetensors" in result["casts"][0]


def test_a_file_that_is_cut_while_it_is_read_takes_a_line(hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    model = open_hf_model(folder)
    [part] = model.weights.parts["model.norm.weight"]
    path, start = part.path, part.find(0)
    os.truncate(path, start + 1)
    target = {"model.norm.weight": torch.empty(32)}
    with pytest.raises(UserError, match=rf"^{path}: ends before byte {start + 64:,};[^\n]*$"):
        load_hf_tensors(model, target, distributed=False)


def test_tools_find_the_model_in_the_folder(hf):
    model = ModelConfig(initialize_from=str(hf))
    assert read_architecture(model).vocab_size == find_assets(model).config["vocab_size"] == 98


def spoil(folder, kind):
    """Make ``folder`` one that no run can start from."""
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    first = folder / sorted(set(listed["weight_map"].values()))[0]
    if kind == "pickled":
        for file in (*folder.glob("*.safetensors"), index):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"")
    elif kind == "missing":
        first.unlink()
    elif kind == "cut":
        first.write_bytes(first.read_bytes()[:-1])
    elif kind == "outside":
        listed["weight_map"]["model.norm.weight"] = "../x.safetensors"
        index.write_text(json.dumps(listed))
    elif kind == "other":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    elif kind == "no config":
        (folder / "config.json").unlink()


REFUSALS = {
    "pickled": "only pickled weights (pytorch_model.bin)",
    "missing": "missing, though model.safetensors.index.json lists it",
    "cut": "truncated or not a safetensors file",
    "outside": "'../x.safetensors', which is not the name of a file next to it",
    "other": "missing model.layers.2",
    "no config": "config.json",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_spoilt_folder_is_refused_on_every_rank_in_one_line(kind, two_ranks, hf_run, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "hf")
    spoil(folder, kind)
    options = ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", str(folder)]
    messages = two_ranks.run(tiny_run.refusal, hf_run, options)
    for message in messages:
        assert REFUSALS[kind] in message and str(folder) in message and "\n" not in message
        assert "model.initialize_from: " in message
    assert not (tmp_path / "run").exists()


def test_a_missing_folder_beside_others_is_not_looked_for_on_the_hub(one_rank, hf_run, hf, tmp_path, monkeypatch):
    monkeypatch.chdir(hf.parent.parent)
    monkeypatch.setattr("retemper.engine.weights.hugging_face.initial.find_model_folder", None)
    options = ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", f"{hf.parent.name}/nothing"]
    with pytest.raises(UserError, match=r"nothing, which does not exist"):
        tiny_run.train(one_rank, hf_run, options)


def test_a_name_on_the_hub_is_fetched_by_one_rank_first(two_ranks, hf_run, hf, tmp_path):
    """Against a fake download; the configuration that is saved keeps the name."""
    options = ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", "somebody/tiny"]
    results = two_ranks.run(hf_starts.train_from_hub, hf_run, options, str(hf))
    assert [asked for asked, _ in results] == [
        [("somebody/tiny", None), ("somebody/tiny", hf.name)],
        [("somebody/tiny", hf.name)] * 2,
    ]
    (_, fetched, *_), (first_of_other, *_) = (moments for _, moments in results)
    assert fetched < first_of_other
    manifest = json.loads(next(tmp_path.glob("run/checkpoints/step-*/manifest.json")).read_text())
    assert manifest["config"]["model"]["initialize_from"] == "somebody/tiny"
    there = hf_starts.tensors_in(hf)
    assert set(tiny_run.tensors_of(next(tmp_path.glob("run/checkpoints/step-*")))) >= set(there)


HTTP = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
"""The client of huggingface_hub, of which its versions have different ones."""
TOKEN = "hf_oNlyForThisTest"
ADDRESS = f"https://somebody:{TOKEN}@cas.example/x?X-Amz-Signature=secret"


def answer(kind: type[Exception], status: int) -> Exception:
    """What huggingface_hub raises for an answer of the Hub."""
    request = HTTP.Request("GET", "https://hub.example")
    return kind(f"{status} from {ADDRESS}\n\nRequest ID", response=HTTP.Response(status, request=request))


def not_cached(cause: Exception) -> Exception:
    """What snapshot_download makes of most problems at the first question."""
    error = errors.LocalEntryNotFoundError(f"Got: {cause}\nAn error happened")
    error.__cause__ = cause
    return error


DOWNLOADS = {
    "timeout": (HTTP.ReadTimeout("timed out"), "not downloaded: ReadTimeout: timed out; start again"),
    "cut": (HTTP.RemoteProtocolError("peer closed\nconnection"), "RemoteProtocolError: peer closed connection; start"),
    "Xet": (RuntimeError(f"CAS: {ADDRESS} Bearer {TOKEN}"), "RuntimeError: CAS: https://cas.example/x Bearer ***; "),
    "full disk": (OSError(28, "No space left on device", "/cache/x"), "No space left on device: '/cache/x'; start"),
    "name": (errors.HFValidationError("Cannot have --"), "HFValidationError: Cannot have --; start again"),
    "token": (answer(errors.HfHubHTTPError, 401), "does not accept the token (401); check HF_TOKEN"),
    "forbidden": (not_cached(answer(errors.HfHubHTTPError, 403)), "the token may not read it (403)"),
    "trouble": (not_cached(answer(errors.HfHubHTTPError, 503)), "not downloaded: the Hub answered 503: HfHubHTTPError"),
    "unreachable": (not_cached(HTTP.ConnectError("no route")), "the Hub cannot be reached; name a folder that holds"),
    "gated": (answer(errors.GatedRepoError, 403), "somebody/tiny: the Hub requires you to accept a licence first"),
    "unknown": (answer(errors.RepositoryNotFoundError, 404), "no such folder, and no such model on the Hub"),
}


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Makes downloads fail, where there is a token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)

    def fail(problem: BaseException) -> None:
        def download(name, **options):
            raise problem

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    return fail


@pytest.mark.parametrize("kind", DOWNLOADS)
def test_a_download_that_fails_takes_one_line_without_secrets(failing, kind):
    problem, said = DOWNLOADS[kind]
    failing(problem)
    with pytest.raises(UserError) as refusal:
        find_model_folder("somebody/tiny")
    message = str(refusal.value)
    assert message.startswith("--hf somebody/tiny: ") and said in message
    assert "\n" not in message and TOKEN not in message and "Amz" not in message
    assert refusal.value.__suppress_context__


class Repository:
    """A fake repository of a folder's files, of which it notes the patterns that were asked for."""

    def __init__(self, folder: Path, copy: Path, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[tuple[str | None, list[str]]] = []
        self._files, self._copy = folder, copy / "0123abcd"
        monkeypatch.setattr("huggingface_hub.snapshot_download", self._download)
        monkeypatch.chdir(copy)

    def _download(self, name: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        self.asked.append((revision, allow_patterns))
        self._copy.mkdir(exist_ok=True)
        for file in self._files.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self._copy)
        return str(self._copy)

    def names(self) -> set[str]:
        return {path.name for path in self._copy.iterdir()}


def test_the_config_is_checked_before_the_weights_are_downloaded(hf, tmp_path, monkeypatch):
    repository = Repository(hf, tmp_path, monkeypatch)
    found = find_model_folder("somebody/tiny")
    (first, config), (second, everything) = repository.asked
    assert first is None and second == found.name, "both requests are for the same commit"
    assert "config.json" in config and not any("safetensors" in pattern for pattern in config)
    assert "*.safetensors" in everything and {path.name for path in hf.iterdir()} <= repository.names()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: edit_json(folder / "config.json", lambda config: config.update(model_type="t5")), "model_type"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"), "this is a PEFT adapter"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_without_its_weights(hf, tmp_path, monkeypatch, spoil, said):
    folder = shutil.copytree(hf, tmp_path / "there")
    spoil(folder)
    repository = Repository(folder, tmp_path, monkeypatch)
    for find in (find_model_folder, lambda name: hf_to_dcp.convert(name, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"^--hf somebody/tiny: .*{said}") as refusal:
            find("somebody/tiny")
        assert str(tmp_path) not in str(refusal.value), "the place in the cache says nothing"
    assert not any(name.endswith(".safetensors") for name in repository.names())


def test_an_interrupted_download_is_no_failed_one(failing):
    failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        find_model_folder("somebody/tiny")


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_download_that_fails_on_one_rank_ends_all(two_ranks, hf_run, tmp_path, failing_rank):
    options = ["--run_folder", str(tmp_path / "run"), "--model.initialize_from", "somebody/tiny"]
    problem = RuntimeError("CAS service error")
    messages = two_ranks.run(hf_starts.refusal_of_download, hf_run, options, problem, failing_rank)
    said = "model.initialize_from somebody/tiny: not downloaded: RuntimeError: CAS service error; "
    assert messages[failing_rank].startswith(said)
    assert messages[1 - failing_rank] == f"rank {failing_rank}: {messages[failing_rank]}"
    assert not (tmp_path / "run").exists()


def test_a_slip_beside_other_folders_is_not_looked_for_on_the_hub(failing, tmp_path):
    """A name of one part is: everything lies beside other folders."""
    failing(errors.LocalEntryNotFoundError("not cached"))
    (tmp_path / "models/base").mkdir(parents=True)
    assert str(find_model_folder("models/base")) == "models/base"
    with pytest.raises(UserError, match=r"^--hf models/bsae: no such folder; name a Hugging Face folder or a Hub name"):
        find_model_folder("models/bsae")
    for name in ("other/bsae", "gpt2"):
        with pytest.raises(UserError, match=f"^--hf {name}: no folder of that name, .* the Hub cannot be reached"):
            find_model_folder(name)
