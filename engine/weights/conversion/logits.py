"""Compare logits for ``--verify``: the same sequences through transformers and our decoder, in float32 on the CPU.

Hashes prove that no bit was lost. This proves that the bits mean the same model in both programs: names, orientation of
matrices, rotary positions, norms, biases, tied embeddings. Code in the folder is never run. Only one model at a time is
in memory, 4 bytes per parameter.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...batch import Batch
from ...errors import UserError
from ...model.architecture import Architecture
from ...model.attention_choice import choose_for_model
from ...model.config_file import read_hf_config
from ...model.implementations import meta_model
from ...model.wrappers import names_in_wrapper, text_config_of
from ..checkpoint.tensors import model_tensors
from ..hugging_face.model import open_hf_model
from ..partial_folder import DiscardOutput
from ..tensor_source import StoredTensor, TensorSource, rows_of

TOLERANCE = 1e-3
"""Maximum difference, relative to the largest logit. Both programs compute in float32, but sum in different orders.
Tiny models differ by about 1e-6, deep ones by more, since every layer rounds again. A tensor in the wrong place, or
rotary positions of another kind, change logits by about their own size."""
_LENGTHS = (7, 33, 64)
"""Tokens in each sequence."""


def compare_logits(
    folder: Path,
    source: TensorSource,
    architecture: Architecture,
    rounded_to: Mapping[str, StoredTensor],
    vocab_size: int,
    max_length: int | None,
) -> dict[str, Any]:
    """Compare transformers on the Hugging Face ``folder`` with our model on ``source``.

    Args:
        folder: of the model, before or after the conversion.
        source: the same tensors on the other side.
        architecture: of the decoder that runs ``source``.
        rounded_to: the dtypes of the output, for names of parameters and of tensors in ``folder``. Both sides round to
            them, so that casts make no difference.
        vocab_size: number of tokens that both sides have. Other logits are not compared.
        max_length: maximum number of tokens of the model, if known.

    Returns:
        For ``conversion.json``: ``max_abs_difference``, ``largest_logit``, ``argmax_agreement``, ...

    Raises:
        UserError: they differ by more than :data:`TOLERANCE` or are not finite, or transformers cannot load the folder.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [min(length, max_length or length) for length in _LENGTHS]
    sequences = [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]
    theirs = [logits[:, :vocab_size] for logits in _theirs(folder, sequences, rounded_to)]
    gc.collect()
    ours = [logits[:, :vocab_size] for logits in _ours(source, architecture, sequences, rounded_to)]
    for who, logits in (("transformers", theirs), ("this program", ours)):
        wrong = [length for length, part in zip(lengths, logits, strict=True) if not part.isfinite().all()]
        if wrong:
            raise DiscardOutput(
                f"--verify: logits of {who} are not finite for sequences of {', '.join(map(str, wrong))} tokens, so "
                f"{folder} cannot be verified; look for weights that are not finite"
            )
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    largest = max(float(logits.abs().max()) for logits in theirs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(ours, theirs, strict=True))
    if difference > TOLERANCE * largest:
        raise DiscardOutput(
            f"--verify: logits of transformers and of this program differ by {difference:.3g} (allowed: "
            f"{TOLERANCE * largest:.3g}, the largest logit is {largest:.3g}), so {folder} is not the same model in "
            "both; please report it with its config.json"
        )
    return {
        "compared_with": f"transformers {_transformers_version()}",
        "computed_in": "float32",
        "sequence_lengths": lengths,
        "max_abs_difference": difference,
        "largest_logit": largest,
        "allowed_difference": TOLERANCE * largest,
        "argmax_agreement": same / sum(lengths),
    }


def describe_logits(measured: Mapping[str, Any]) -> str:
    """Return a line about the result of :func:`compare_logits`."""
    return (
        f"verified: logits differ from {measured['compared_with']} by at most {measured['max_abs_difference']:.2g} "
        f"(the largest is {measured['largest_logit']:.3g}), the most likely token agrees at "
        f"{measured['argmax_agreement']:.1%} of positions"
    )


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def _round(tensor: Tensor, name: str, rounded_to: Mapping[str, StoredTensor]) -> Tensor:
    """Return ``tensor`` as it is after a conversion, in float32."""
    return tensor.to(rounded_to[name].dtype).float() if name in rounded_to else tensor.float()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def _theirs(folder: Path, sequences: list[Tensor], rounded_to: Mapping[str, StoredTensor]) -> list[Tensor]:
    """Return the [T, V] logits of every sequence, computed by transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        # If the embeddings have more rows than the config says, all of them are loaded.
        config.get_text_config().vocab_size = open_hf_model(folder, any_vocab_size=True).architecture.vocab_size
        is_text = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind: Any = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
        with _without_progress_bars():
            loaded: Any = kind.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # it has no class of its own for unsupported settings
        raise UserError(f"--verify: transformers cannot load {folder}: {' '.join(str(error).split())}") from error
    model, loading = loaded
    if loading["missing_keys"]:  # it uses random values for them
        raise DiscardOutput(
            f"--verify: transformers does not find {sorted(loading['missing_keys'])[0]} in {folder}, because of the "
            "names of its tensors, so the logits cannot be compared; convert it without --verify"
        )
    text_names = {there: name for name, there in _names_of_modules(folder, model).items()}
    for name, parameter in model.named_parameters():
        parameter.copy_(_round(parameter, text_names.get(name, name), rounded_to))
    model.eval()
    return [model(tokens[None], use_cache=False).logits[0] for tokens in sequences]


def _names_of_modules(folder: Path, model: Any) -> dict[str, str]:
    """Return, for a wrapper, the names of its parameters by their names in files of its text model alone."""
    config = read_hf_config(folder)
    if not text_config_of(config)[1]:
        return {}
    return names_in_wrapper(config, {name for name, _ in model.named_parameters()})


@torch.inference_mode()
def _ours(
    source: TensorSource, architecture: Architecture, sequences: list[Tensor], rounded_to: Mapping[str, StoredTensor]
) -> list[Tensor]:
    """Return the [T, V] logits of every sequence, computed by our decoder."""
    device = torch.device("cpu")
    decoder = meta_model(architecture).cast_parameters(torch.float32).materialize(device).eval()
    for name, parameter in model_tensors(decoder).items():
        with source.rows(name) as read:
            stored = torch.empty(rows_of(source.tensors[name].shape), dtype=source.tensors[name].dtype)
            read(0, stored)
            parameter.copy_(_round(stored, name, rounded_to).view(parameter.shape))
    backend = choose_for_model("auto", architecture, device, torch.float32).backend
    results = []
    for tokens_T in sequences:
        batch = Batch.of_documents(tokens_T, [len(tokens_T)])
        results.append(decoder.logits(batch.prepare(device, backend, architecture.sliding_windows)))
    return results
