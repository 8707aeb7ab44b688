"""``training.attention_backend``: a forced backend computes and is named in the log, or is refused at the start."""

import pytest
import tiny_run
import torch

from retemper.engine import start
from retemper.kernels import attention as package
from retemper.kernels.attention import Choice

ACROSS = ["--data.attend_across_documents", "true"]


def test_a_batch_of_whole_windows_has_the_same_gradients(one_rank, run_file, tmp_path, monkeypatch):
    calls = []
    batched = package.batched_attention
    monkeypatch.setattr(package, "batched_attention", lambda *args, **kw: calls.append(args[3]) or batched(*args, **kw))
    gradients = {
        backend: tiny_run.first_gradients(
            one_rank, run_file, [*ACROSS, "--run_folder", str(tmp_path), "--training.attention_backend", backend]
        )
        for backend in ("per_document", "sdpa")
    }
    assert calls
    assert len(set(calls)) == 1
    assert gradients["sdpa"].keys() == gradients["per_document"].keys()
    for name, gradient in gradients["sdpa"].items():
        torch.testing.assert_close(gradient, gradients["per_document"][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("across", [True, False])
def test_a_run_replaces_its_backend_for_documents_of_one_length(one_rank, run_file, tmp_path, monkeypatch, across):
    """As ``auto`` decides on a GPU. The documents of this data are short."""
    calls = []
    batched = package.batched_attention
    monkeypatch.setattr(package, "batched_attention", lambda *args, **kw: calls.append(args[3]) or batched(*args, **kw))
    overrides = ["--run_folder", str(tmp_path), "--data.attend_across_documents", str(across).lower()]

    def gradients(replacement):
        choice = Choice("per_document", "a test", replacement)
        monkeypatch.setattr(start, "choose_attention", lambda *args: choice)
        return tiny_run.first_gradients(one_rank, run_file, overrides)

    expected = gradients(None)
    assert not calls
    actual = gradients("sdpa")
    assert bool(calls) is across
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_log_names_the_backend(one_rank, run_file, tmp_path, capsys):
    overrides = [*ACROSS, "--run_folder", str(tmp_path), "--training.attention_backend", "sdpa"]
    tiny_run.train_until(one_rank, run_file, overrides, 1)
    line = "attention   sdpa: PyTorch SDPA over documents of one length as a batch; as configured"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_attn", "training.attention_backend: attention by flash_attn needs a GPU, and the run is on cpu; use "),
        ("sdpa", "attention by sdpa is for documents of one length (data.attend_across_documents: true); use auto or "),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(one_rank, run_file, tmp_path, backend, message):
    folder = tmp_path / "run"
    overrides = ["--run_folder", str(folder), "--training.attention_backend", backend]
    assert message in tiny_run.refusal(one_rank, run_file, overrides)
    assert not folder.exists()
