"""Convert a checkpoint with an adapter to a folder of PEFT."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import UserError
from ..adapters.peft import PEFT_WEIGHTS
from ..checkpoint.assets import MODEL_FILES, HfAssets
from ..hugging_face.shards import safetensors_file
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name
from .pipeline import Conversion, Target, Written
from .provenance import ConversionRecord
from .stored_model import StoredModel


def plan_peft_export(model: StoredModel, dtype: torch.dtype | None, ema: bool = False) -> Conversion:
    """Return the plan of a folder of PEFT.

    Args:
        model: an opened checkpoint.
        dtype: of the output; None: that of the checkpoint.
        ema: whether the adapter is the moving average of that of the checkpoint.

    Raises:
        UserError: it holds no adapter, or one that PEFT cannot represent.
    """
    adapted = model.adapted
    if adapted is None:
        raise UserError(f"{model.folder}: holds all parameters and no adapter; convert it without --adapter")
    peft = adapted.peft
    try:
        peft.config.require_form(adapted.base_folder, model.config)
    except UserError as error:
        raise UserError(f"{model.folder}: {error}") from None
    source = peft.tensors
    tensors = cast_to(source.tensors, dtype)
    others = {name: data for name, data in model.assets.of_model().files.items() if name not in MODEL_FILES}
    assets = HfAssets({**others, **peft.config.files(adapted.base_name)})

    def complete(folder: Path, done: Written) -> None:
        assets.write(folder)

    options = {"dtype": "auto" if dtype is None else dtype_name(dtype), "adapter": True} | (
        {"ema": True} if ema else {}
    )
    return Conversion(
        model=model,
        source=source,
        tensors=tensors,
        target=Target([safetensors_file(PEFT_WEIGHTS, tensors)], complete),
        record=ConversionRecord("dcp_to_hf", model.identify(), options, left_out=model.left_out),
        stored={**source.tensors, **model.unused},
        casts=describe_casts(source.tensors, tensors),
    )
