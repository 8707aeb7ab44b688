"""The decoder's parameters and the tensors that transformers saves are the same values, each in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import MODELS, hf_config, hf_model, our_model, parts_of, stored_state
from torch import Tensor

from retemper.engine.model.decoder import Decoder


def joined(decoder: Decoder, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of ``decoder`` as files hold them; NaN where no parameter is."""
    parameters = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    pieces = decoder.architecture.stored_pieces({name: tuple(p.shape) for name, p in parameters.items()})
    stored = {name: torch.full(tensor.shape, float("nan")) for name, tensor in like.items()}
    for name, parameter in parameters.items():
        for piece in pieces.get(name, ()):
            target = tuple(slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
            sizes = (1,) * (len(piece.at) - len(piece.sizes)) + piece.sizes
            source = tuple(slice(start, start + size) for start, size in zip(piece.at, sizes, strict=True))
            assert stored[piece.tensor][target].isnan().all(), "two parameters in one place"
            stored[piece.tensor][target] = parameter[source].view(piece.sizes)
        if name not in pieces:
            stored[name] = parameter
    return stored


@pytest.mark.parametrize("name", MODELS)
def test_files_and_decoder_hold_the_same_values(name: str, tmp_path: Path) -> None:
    hf = hf_model(hf_config(name))
    stored, decoder = stored_state(hf, tmp_path), our_model(hf)
    state = decoder.state_dict()
    for parameter, values in parts_of(decoder, stored).items():
        assert torch.equal(state[parameter], values), parameter
    back = joined(decoder, stored)
    assert back.keys() == stored.keys()
    for tensor, values in stored.items():
        assert torch.equal(back[tensor], values), tensor
