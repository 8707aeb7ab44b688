"""One product for layers with the same input: the numbers of separate products, for every parameter; the same
checkpoints; fewer products."""

from __future__ import annotations

import functools
from pathlib import Path

import packed_model
import parity_run
import pytest
import tiny_run
import torch
from parity_run import Model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.engine.model import decoder as decoder_module
from retemper.engine.parallel import build
from retemper.engine.parallel import compile as block_compile

FUSED = " --training.fuse_projections true"
MODELS = {
    "biases": Model("qwen2", tied=True, packed=True),  # of queries, keys and values
    "norms": Model("qwen3", tied=False, packed=True),  # of queries and keys
    "no gate": Model("starcoder2", tied=True, packed=True),
}
DTYPES = {
    "fp32": ("--training.precision fp32", 1e-5),
    "bf16": ("--training.precision bf16", 2e-2),
    "bf16 weights": ("--training.precision bf16 --training.weight_dtype bf16", 2e-2),
}


@pytest.fixture(scope="module")
def run_files(tmp_path_factory) -> dict[str, Path]:
    """Tiny runs."""
    return {name: parity_run.write_run(tmp_path_factory.mktemp("fused"), model) for name, model in MODELS.items()}


def built(ranks, path: Path, options: str):
    return pretrain.build(parse_config(["--config", str(path), *options.split()]), ranks)


def gradients(run) -> dict[str, Tensor]:
    """Of the first global batch, by name."""
    batches = run.data.micro_batches(0)
    run.forward_backward.accumulate_gradients(batches, float(sum(x.num_targets for x in batches)), lambda phase: None)
    return tiny_run.gradients(run)


@pytest.mark.parametrize("batch_size", ["8", "2"], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_every_gradient_is_that_of_separate_products(model, dtypes, batch_size, one_rank, run_files):
    options, bound = DTYPES[dtypes]
    options += f" --training.micro_batch_size {batch_size}"
    expected = gradients(built(one_rank, run_files[model], options))
    run = built(one_rank, run_files[model], options + FUSED)
    for _ in range(2):  # the second time, gradients are zeroed and set again
        actual = gradients(run)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0 and actual[name].dtype == gradient.dtype, name
            assert (actual[name] - gradient).norm() <= bound * gradient.norm(), name
        run.optimizer.zero_grad()


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_fewer_products_and_none_repeated(recompute, one_rank, run_files):
    """Of seven linear layers in a block, four products are left: each once forward and twice backward."""
    counts = {}
    for options in ("", FUSED):
        run = built(
            one_rank, run_files["norms"], f"--training.micro_batch_size 8 --parallel.recompute {recompute}{options}"
        )
        with Products() as products:
            gradients(run)
        counts[options] = products.count
    assert counts[""] - counts[FUSED] == 4 * 3 * 3  # layers, products less in each, passes


def test_weights_are_trained_and_saved_as_before(one_rank, tmp_path):
    """A run with fused products resumes exactly, and continues one with separate products."""
    path = tiny_run.write_config(tmp_path)
    curves, last = {}, {}
    for name, options in {"separate": "", "fused": FUSED}.items():
        tiny_run.train(one_rank, path, ["--run_folder", str(tmp_path / name), *options.split()])
        curves[name] = tiny_run.curve(tmp_path / name)
        last[name] = tiny_run.tensors_of(tmp_path / name / "checkpoints" / "step-00000020")
    assert [x[2] for x in curves["separate"]] == pytest.approx([x[2] for x in curves["fused"]], rel=1e-4)
    for name, tensor in last["separate"].items():
        other = last["fused"].pop(name)
        assert other.dtype == tensor.dtype and torch.allclose(other, tensor, rtol=1e-3, atol=1e-5), name
    assert not last["fused"]
    for name, curve in curves.items():
        folder, checkpoint = tmp_path / f"from {name}", tmp_path / name / "checkpoints" / "step-00000012"
        tiny_run.train(one_rank, path, ["--resume", str(checkpoint), "--run_folder", str(folder), *FUSED.split()])
        again = tiny_run.curve(folder)
        assert [x[2] for x in again] == pytest.approx([x[2] for x in curve[-len(again) :]], rel=1e-4)
        assert name == "separate" or again == curve[-len(again) :]


def test_compiled_blocks_share_a_graph(one_rank, run_files, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(block_compile, "enabled", lambda *_: True)
    monkeypatch.setattr(build.block_compile, "apply", functools.partial(block_compile.apply, backend=counter))
    monkeypatch.setattr(decoder_module, "attention", packed_model.compilable_attention)
    run = built(one_rank, run_files["norms"], "--training.precision bf16 --training.micro_batch_size 8" + FUSED)
    compiled = []
    for step in range(3):
        batches = run.data.micro_batches(step * parity_run.GLOBAL_BATCH)
        pretrain.one_step(run, batches, float(sum(batch.num_targets for batch in batches)))
        compiled.append(counter.frame_count)
    assert compiled == [1, 1, 1]  # of four blocks


def refusal(ranks, path: Path, options: str) -> str:
    with pytest.raises(UserError) as error:
        built(ranks, path, options + FUSED)
    return str(error.value)


def test_what_does_not_work_is_refused(two_ranks, run_files):
    options = {"several data-parallel ranks": "", "parallel.tensor 2": "--parallel.tensor 2"}
    options["parallel.pipeline 2"] = "--parallel.pipeline 2 --training.micro_batch_size 2"
    for name, given in options.items():
        for line in two_ranks.run(refusal, run_files["norms"], given):
            assert line == f"training.fuse_projections is true, which does not work with {name}; set it to false"
