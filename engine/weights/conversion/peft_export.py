"""Convert a checkpoint with an adapter to a folder of PEFT."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import UserError
from ...model.config_file import CONFIG_FILE
from ...model.implementations import parse_architecture
from ..adapters.opening import BASE_OPTION, AdaptedModel
from ..adapters.peft import PEFT_WEIGHTS, require_same_config
from ..checkpoint.assets import MODEL_FILES, HfAssets, is_hf_folder
from ..hugging_face.shards import safetensors_file
from ..hugging_face.weight_dtypes import cast_to, describe_casts, dtype_name
from .pipeline import Conversion, Target, Written
from .provenance import ConversionRecord
from .stored_model import StoredModel

_MERGED = "export the merged model instead: dcp_to_hf.py without --adapter"


def plan_peft_export(model: StoredModel, dtype: torch.dtype | None) -> Conversion:
    """Return the plan of a folder of PEFT.

    Args:
        model: an opened checkpoint.
        dtype: of the output; None: that of the checkpoint.

    Raises:
        UserError: it holds no adapter, or one that PEFT cannot represent.
    """
    adapted = model.adapted
    if adapted is None:
        raise UserError(f"{model.folder}: holds all parameters and no adapter; convert it without --adapter")
    _require_loadable(model, adapted)
    peft = adapted.peft
    source = peft.tensors
    tensors = cast_to(source.tensors, dtype)
    others = {name: data for name, data in model.assets.of_model().files.items() if name not in MODEL_FILES}
    assets = HfAssets({**others, **peft.files(adapted.base_name)})

    def complete(folder: Path, done: Written) -> None:
        assets.write(folder)

    options = {"dtype": "auto" if dtype is None else dtype_name(dtype), "adapter": True}
    return Conversion(
        model=model,
        source=source,
        tensors=tensors,
        target=Target([safetensors_file(PEFT_WEIGHTS, tensors)], complete),
        record=ConversionRecord("dcp_to_hf", model.identify(), options, left_out=model.left_out),
        stored={**source.tensors, **model.unused},
        casts=describe_casts(source.tensors, tensors),
    )


def _require_loadable(model: StoredModel, adapted: AdaptedModel) -> None:
    """Refuse an adapter of a model that PEFT would load in another form.

    Raises:
        UserError: says why.
    """
    if model.carried() is not None:
        raise UserError(
            f"{model.folder}: the adapter is for the text model inside of another one, whose layers have other names "
            f"in PEFT; {_MERGED}"
        )
    if not is_hf_folder(adapted.base_folder):
        raise UserError(
            f"{model.folder}: the base model {adapted.base_folder} is a checkpoint, which PEFT cannot load; convert it "
            f"with dcp_to_hf.py, and name the result with {BASE_OPTION}"
        )
    config = adapted.base_folder / CONFIG_FILE
    base = parse_architecture(_config_of(adapted.base_folder), str(config))
    require_same_config(model.folder, base, parse_architecture(model.config, str(model.asset_folder / CONFIG_FILE)))


def _config_of(folder: Path) -> dict:
    config = HfAssets.read(folder).config
    assert config is not None  # the weights were opened with it
    return config
