"""The Hugging Face folder at the end of a run: the bytes of dcp_to_hf, whatever ranks wrote it and whatever befell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_hub
import hf_exports
import pytest
import tiny_run
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from retemper.engine import pretrain
from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.conversion import dcp_to_hf

CHECKPOINT, EXPORT = "checkpoints/step-00000004", "hf/step-00000004"
COMMAND = str(Path(__file__).parents[3] / "checkpoint_convert" / "dcp_to_hf.py")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below ``folder``."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def converted(run_folder: Path, output: Path) -> dict[str, object]:
    """What the command makes of the run's last checkpoint."""
    dcp_to_hf.convert(run_folder / CHECKPOINT, output, max_shard_size=hf_exports.SHARD_SIZE, say=lambda line: None)
    return exported(output)


def exported(folder: Path) -> dict[str, object]:
    """As :func:`contents`, but for the hash of the code that made it, of which ranks may have an earlier view."""
    files: dict[str, object] = dict(contents(folder))
    proof = json.loads((folder / "conversion.json").read_text())
    del proof["versions"]["code"]
    return {**files, "conversion.json": proof}


@pytest.mark.parametrize("layout", [[], ["--parallel.tensor", "1", "--parallel.pipeline", "2"]])
def test_two_ranks_write_what_the_converter_writes(two_ranks, run_file, tmp_path, layout):
    options = ["--run_folder", str(tmp_path / "run"), "--logging.tensorboard", "false", *layout]
    written = two_ranks.run(hf_exports.train, run_file, options)
    expected = converted(tmp_path / "run", tmp_path / "converted")
    assert exported(tmp_path / "run" / EXPORT) == expected
    assert not set(written[0]) & set(written[1]) and min(map(len, written)) >= 2
    assert {name for name in expected if name.endswith(".safetensors")} == {*written[0], *written[1]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / EXPORT).config.vocab_size == tiny_run.VOCAB_SIZE
    assert [path.name for path in (tmp_path / "run/hf").iterdir()] == ["step-00000004"]


def test_an_export_that_is_wanted_later_is_made_later_and_once(one_rank, run_file, tmp_path, capsys):
    options = ["--run_folder", str(tmp_path / "run")]
    tiny_run.train(one_rank, run_file, [*hf_exports.SHORT, *options, "--checkpoint.export_hf", "false"])
    assert not (tmp_path / "run/hf").exists()
    hf_exports.train(one_rank, run_file, options)
    assert exported(tmp_path / "run" / EXPORT) == converted(tmp_path / "run", tmp_path / "converted")
    capsys.readouterr()
    assert hf_exports.train(one_rank, run_file, options) == []
    assert f"exported    {tmp_path / 'run' / EXPORT} already" in capsys.readouterr().out


def test_a_run_that_is_extended_is_exported_again(one_rank, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path / "run"), "--optimizer.schedule", "constant"]
    hf_exports.train(one_rank, run_file, options)
    hf_exports.train(one_rank, run_file, [*options, "--training.train_tokens", str(5 * 8 * 32)])
    assert sorted(path.name for path in (tmp_path / "run/hf").iterdir()) == ["step-00000004", "step-00000005"]


def test_a_run_that_is_not_at_its_end_is_not_exported(one_rank, run_file, tmp_path):
    options = [*hf_exports.SHORT, "--run_folder", str(tmp_path / "run"), "--checkpoint.save_interval", "2"]
    tiny_run.train_until(one_rank, run_file, options, 2)
    assert not (tmp_path / "run/hf").exists()


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failed_export_costs_no_checkpoint_and_is_made_up_for(two_ranks, run_file, tmp_path, failing_rank):
    options = ["--run_folder", str(tmp_path / "run")]
    messages = two_ranks.run(hf_exports.train_on_a_full_disk, run_file, options, failing_rank)
    for message in messages:
        assert "checkpoint.export_hf: " in message and "No space left on device" in message and "\n" not in message
        assert message.endswith(f"dcp_to_hf.py --checkpoint {tmp_path / 'run' / CHECKPOINT}")
    assert contents(tmp_path / "run/hf") == {}
    manifest, damage = find_damage(tmp_path / "run" / CHECKPOINT)
    assert manifest is not None and manifest.final and not damage
    two_ranks.run(hf_exports.train, run_file, options)
    assert exported(tmp_path / "run" / EXPORT) == converted(tmp_path / "run", tmp_path / "converted")


def test_a_run_that_is_asked_to_stop_breaks_the_export_off(two_ranks, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path / "run")]
    two_ranks.run(hf_exports.train_and_ask_to_stop, run_file, options)
    assert contents(tmp_path / "run/hf") == {}
    two_ranks.run(hf_exports.train, run_file, options)
    assert exported(tmp_path / "run" / EXPORT) == converted(tmp_path / "run", tmp_path / "converted")


def test_a_checkpoint_that_is_damaged_meanwhile_is_not_exported(one_rank, run_file, tmp_path):
    options = [*hf_exports.SHORT, "--run_folder", str(tmp_path / "run"), "--checkpoint.save_interval", "2"]
    tiny_run.train(one_rank, run_file, [*options, "--checkpoint.export_hf", "false"])
    run = pretrain.build(tiny_run.configure(run_file, *options), one_rank)
    file = next((tmp_path / "run" / CHECKPOINT).glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"^checkpoint.export_hf: .*safetensors: damaged.*; start the same command again: it"
    ):
        pretrain.train(run)
    assert not (tmp_path / "run" / EXPORT).exists()
    tiny_run.train(one_rank, run_file, options)
    assert (tmp_path / "run" / EXPORT).exists()


def test_what_is_in_the_way_stays(one_rank, run_file, tmp_path):
    other = tmp_path / "run" / EXPORT
    other.mkdir(parents=True)
    (other / "config.json").write_text("mine")
    with pytest.raises(UserError, match=r"step-00000004: .*is not an export: it has no conversion.json; move it away"):
        hf_exports.train(one_rank, run_file, ["--run_folder", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "checkpoints").exists()
    # The export of another checkpoint may become that of this one, when the run comes to it again.
    (other / "conversion.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000004: exists already, and .* names another checkpoint"):
        hf_exports.train(one_rank, run_file, ["--run_folder", str(tmp_path / "run")])
    assert contents(other) == {"config.json": b"mine", "conversion.json": b"{}"}
    assert find_damage(tmp_path / "run" / CHECKPOINT)[1] == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process talks to, logged in."""
    with fake_hub.FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield hub


def test_a_run_uploads_its_export(hub, one_rank, run_file, tmp_path, capsys):
    options = ["--run_folder", str(tmp_path / "run"), "--checkpoint.push_to_hub", "somebody/tiny"]
    hf_exports.train(one_rank, run_file, options)
    expected = contents(tmp_path / "run" / EXPORT)
    del expected["conversion.json"]
    assert hub.repositories == {"somebody/tiny": expected} and hub.commits == 1
    said = capsys.readouterr().out
    assert f"upload      at the end, to {hub.url}/somebody/tiny (private), as somebody" in said
    everything = b"".join(contents(tmp_path / "run").values()) + said.encode()
    assert fake_hub.TOKEN.encode() not in everything


def test_a_failed_upload_leaves_the_export_and_the_same_command_makes_it(hub, one_rank, run_file, tmp_path):
    options = ["--run_folder", str(tmp_path / "run"), "--checkpoint.push_to_hub", "somebody/tiny"]
    hub.refusals["/commit/main"] = 501
    with pytest.raises(UserError, match=r"checkpoint.push_to_hub somebody/tiny: the Hub answered 501.* hf upload"):
        hf_exports.train(one_rank, run_file, options)
    assert exported(tmp_path / "run" / EXPORT) == converted(tmp_path / "run", tmp_path / "converted")
    hub.refusals.clear()
    assert hf_exports.train(one_rank, run_file, options) == []
    assert "model.safetensors.index.json" in hub.repositories["somebody/tiny"]


def test_a_missing_token_is_found_out_before_the_training(hub, monkeypatch, two_ranks, run_file, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    options = [*hf_exports.SHORT, "--run_folder", str(tmp_path / "run"), "--checkpoint.push_to_hub", "somebody/tiny"]
    messages = two_ranks.run(tiny_run.refusal, run_file, options)
    said = "checkpoint.push_to_hub somebody/tiny: "
    assert messages[0].startswith(said) and messages[1] == f"rank 0: {messages[0]}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint.push_to_hub", "a/b"], "checkpoint.push_to_hub is a/b, but checkpoint.export_hf is false"),
        (
            ["--checkpoint.export_hf", "true", "--checkpoint.push_to_hub", "tiny"],
            "'tiny'; name a repository on the Hub",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(run_file, options, message):
    with pytest.raises(UserError) as refused:
        tiny_run.configure(run_file, *options)
    assert message in str(refused.value)


@pytest.mark.slow
def test_the_converters_command_uploads(one_rank, run_file, tmp_path):
    hf_exports.train(one_rank, run_file, ["--run_folder", str(tmp_path / "run"), "--checkpoint.export_hf", "false"])
    with fake_hub.FakeHub() as hub:
        places = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, COMMAND, "--checkpoint", str(tmp_path / "run" / CHECKPOINT), "--output"]
        push = ["--push-to-hub", "somebody/tiny"]
        run = lambda output, **token: subprocess.run(  # noqa: E731
            [*command, str(output), *push],
            env={"PATH": "", **places, **token},
            capture_output=True,
            text=True,
            check=False,
        )
        without = run(tmp_path / "a")
        assert (without.returncode, (tmp_path / "a").exists()) == (1, False)
        assert without.stderr == (
            "error: --push-to-hub somebody/tiny: no token; set HF_TOKEN, or log in with `hf auth login`\n"
        )
        done = run(tmp_path / "b", HF_TOKEN=fake_hub.TOKEN)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"uploaded {hub.url}/somebody/tiny/commit/{'1' * 40}\n")
        expected = contents(tmp_path / "b")
        del expected["conversion.json"]
        assert hub.repositories["somebody/tiny"] == expected
        assert fake_hub.TOKEN not in done.stdout + done.stderr
