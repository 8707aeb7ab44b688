"""Make a Hugging Face folder out of a checkpoint.

    python checkpoint_convert/dcp_to_hf.py --checkpoint runs/x/checkpoints/step-00001000 --output hf/

A training checkpoint holds fp32 master weights; they are written in the dtype that the model's config declares. A
converted checkpoint gives back, bit for bit, the tensors it was made from. ``--dtype`` overrides both. Optimizer
states are left out. One output file's tensors at a time are in memory.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from retemper.engine.checkpoint.assets import ASSET_FOLDER, CONFIG_FILE, HfAssets
from retemper.engine.checkpoint.manifest import read_manifest
from retemper.engine.checkpoint.new_folder import new_folder, require_absent
from retemper.engine.checkpoint.tensors import StoredTensor, check_model_tensors, load_tensors, stored_tensors
from retemper.engine.checkpoint.verify import require_undamaged
from retemper.engine.errors import CommandParser, run_command
from retemper.engine.hugging_face.folder import DEFAULT_MAX_SHARD_SIZE, parse_shard_size, write_shards
from retemper.engine.hugging_face.model import meta_decoder
from retemper.engine.hugging_face.weight_dtypes import (
    AUTO,
    DTYPE_CHOICES,
    cast_to,
    declared_dtype,
    declaring,
    describe_casts,
    dtype_named,
)
from retemper.engine.model.architecture import parse_architecture, read_hf_config


def convert(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str = AUTO,
    max_shard_size: str = DEFAULT_MAX_SHARD_SIZE,
    say: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face folder ``output`` from ``checkpoint``.

    Args:
        checkpoint: a folder written by the trainer or by hf_to_dcp.
        output: the Hugging Face folder; it must not exist.
        dtype: ``auto`` keeps the tensors of a converted checkpoint, and writes a training checkpoint in the dtype that
            its config declares, else float32.
        max_shard_size: largest safetensors file, such as ``5GB``.
        say: takes the lines that tell what was cast and written.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or ``output`` exists or cannot be written. Nothing is left
            behind.
    """
    output = require_absent(output)
    target, shard_bytes = dtype_named(dtype), parse_shard_size(max_shard_size)
    manifest = read_manifest(checkpoint)
    where = Path(checkpoint) / ASSET_FOLDER / CONFIG_FILE
    config = read_hf_config(where)
    if target is None and manifest.kind == "training":
        target = declared_dtype(config, str(where)) or torch.float32

    decoder = meta_decoder(parse_architecture(config, str(where)))
    check_model_tensors(checkpoint, decoder)
    stored = stored_tensors(checkpoint)
    tensors = cast_to({name: stored[name] for name, _ in decoder.named_parameters()}, target)
    assets = declaring(HfAssets.of_checkpoint(checkpoint), (tensor.dtype for tensor in tensors.values()))
    for line in describe_casts(stored, tensors):
        say(line)

    whole = sum(record.bytes for record in manifest.records.values())
    with tqdm(desc="verifying", total=whole, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        require_undamaged(Path(checkpoint), bar.update)
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(output) as temporary:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def read(wanted: dict[str, StoredTensor]) -> dict[str, Tensor]:
                loaded = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in wanted.items()}
                load_tensors(checkpoint, loaded, distributed=False)
                bar.update(sum(tensor.num_bytes for tensor in wanted.values()))
                return loaded

            write_shards(temporary, tensors, shard_bytes, read)
        assets.write(temporary)
    say(f"wrote {output}: {len(tensors)} tensors, {tqdm.format_sizeof(num_bytes, 'B')}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(description="Make a Hugging Face folder out of a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="such as runs/x/checkpoints/step-00001000, or a converted one",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default=AUTO,
        help="dtype of the weights (default: what the model's config declares, for a training checkpoint; unchanged, "
        "for a converted one)",
    )
    parser.add_argument(
        "--max-shard-size",
        default=DEFAULT_MAX_SHARD_SIZE,
        metavar="SIZE",
        help="largest safetensors file (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    # A scheduler's SIGTERM cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    convert(**vars(parse_arguments()))


if __name__ == "__main__":
    run_command(main)
