"""Float8 layers: which layers become them, what is refused, and how far their numbers are from bf16's."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from packed_model import gradients, packed, tiny_decoder
from torch import nn

from retemper.engine.config.settings import TrainingConfig
from retemper.engine.errors import UserError
from retemper.engine.parallel import float8

CUDA = torch.device("cuda")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def refusal(device: torch.device) -> str:
    with pytest.raises(UserError) as caught:
        float8.enabled(TrainingConfig(1, float8=True), device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def installed(monkeypatch, there: bool):
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: object() if there else None)


def test_off_asks_for_nothing(monkeypatch):
    installed(monkeypatch, False)
    assert not float8.enabled(TrainingConfig(1), torch.device("cpu"))


def test_a_missing_torchao_is_said_with_its_installation(monkeypatch):
    installed(monkeypatch, False)
    assert "pip install 'retemper[fp8]'" in refusal(CUDA)


def test_a_device_without_float8_is_refused(monkeypatch):
    installed(monkeypatch, True)
    assert "the run is on cpu" in refusal(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert "NVIDIA A100 has compute capability 8.0, and float8 needs 8.9" in refusal(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert float8.enabled(TrainingConfig(1, float8=True), CUDA)


@needs_torchao
def test_blocks_of_fitting_widths_are_converted_and_names_stay():
    plain = tiny_decoder(num_layers=2, device="meta", intermediate_size=72)
    model = tiny_decoder(num_layers=2, device="meta", intermediate_size=72)
    float8.convert(model)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # 72 is no multiple of 16, so the feed-forward layers stay; the head stays by rule.
    expected = {f"model.layers.{i}.self_attn.{p}_proj": "Float8Linear" for i in (0, 1) for p in "qkvo"}
    expected |= {f"model.layers.{i}.mlp.{p}_proj": "Linear" for i in (0, 1) for p in ("gate", "up", "down")}
    assert kinds == {**expected, "lm_head": "Linear"}
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]


def assert_near(model, plain, batch):
    """Float8 has 3 bits of mantissa: a product's relative error is up to 1/16, its sums' some percent."""
    actual, expected = gradients(model, batch), gradients(plain, batch)
    assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-2)
    assert actual["loss"] != expected["loss"]
    for name, value in expected.items():
        assert torch.cosine_similarity(actual[name].flatten(), value.flatten(), dim=0) > 0.97, name


@needs_torchao
def test_emulated_losses_and_gradients_are_near():
    model, plain = tiny_decoder(), tiny_decoder()
    float8.convert(model, emulate=True)
    assert_near(model, plain, packed(10, 50))


@needs_torchao
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8"
)
def test_losses_and_gradients_on_a_gpu_are_near():
    model, plain = (tiny_decoder().to(CUDA, torch.bfloat16) for _ in range(2))
    float8.convert(model)
    assert_near(model, plain, packed(10, 50).to(CUDA))
