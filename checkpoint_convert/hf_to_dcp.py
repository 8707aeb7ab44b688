"""Make a checkpoint to train from out of a Hugging Face folder.

    python checkpoint_convert/hf_to_dcp.py --hf Qwen/Qwen2-72B --output ckpt/base
    python checkpoint_convert/hf_to_dcp.py --hf models/llama --output ckpt/llama --dtype bfloat16

The checkpoint keeps every bit and every dtype unless ``--dtype`` says otherwise, and carries config and tokenizer.
Tensors pass through memory one at a time.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from retemper import __version__
from retemper.engine.checkpoint.assets import ASSET_FOLDER, TOKENIZER_FILE, HfAssets
from retemper.engine.checkpoint.manifest import Manifest, write_manifest
from retemper.engine.checkpoint.new_folder import new_folder, require_absent
from retemper.engine.checkpoint.tensors import save_streamed_tensors
from retemper.engine.errors import CommandParser, run_command
from retemper.engine.hugging_face.hub_download import find_model_folder
from retemper.engine.hugging_face.model import open_hf_model
from retemper.engine.hugging_face.weight_dtypes import (
    AUTO,
    DTYPE_CHOICES,
    cast_to,
    declaring,
    describe_casts,
    dtype_named,
)


def convert(hf: str, output: str | Path, dtype: str = AUTO, say: Callable[[str], None] = print) -> None:
    """Write the checkpoint ``output`` from the Hugging Face model ``hf``.

    Args:
        hf: a folder, or a name on the Hub.
        output: the checkpoint folder; it must not exist.
        dtype: ``auto`` keeps each tensor's own; else bfloat16, float16 or float32.
        say: takes the lines that tell what was cast, left out and written.

    Raises:
        UserError: the model cannot be used, or ``output`` exists or cannot be written. Nothing is left behind.
    """
    output = require_absent(output)
    target = dtype_named(dtype)
    folder = find_model_folder(hf)
    model = open_hf_model(folder)
    tensors = cast_to(model.tensors, target)
    assets = declaring(HfAssets.read(folder), (tensor.dtype for tensor in tensors.values()))
    for line in [*model.notes, *describe_casts(model.tensors, tensors)]:
        say(line)
    if TOKENIZER_FILE not in assets.files:
        say(f"{folder} holds no {TOKENIZER_FILE}: the checkpoint carries no tokenizer")

    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    with new_folder(output) as temporary:
        with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:

            def read(name: str) -> Tensor:
                bar.update(tensors[name].num_bytes)
                return model.read(name).to(tensors[name].dtype)

            save_streamed_tensors(temporary, tensors, read)
        assets.write(temporary / ASSET_FOLDER)
        write_manifest(temporary, Manifest(kind="converted", retemper_version=__version__))
    say(f"wrote {output}: {len(tensors)} tensors, {tqdm.format_sizeof(num_bytes, 'B')}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options on the command line, by default that of this process."""
    parser = CommandParser(description="Make a checkpoint to train from out of a Hugging Face folder.")
    parser.add_argument("--hf", required=True, metavar="DIR|NAME", help="Hugging Face folder, or Hub name")
    parser.add_argument("--output", required=True, metavar="DIR", help="checkpoint to write; it must not exist")
    parser.add_argument(
        "--dtype",
        choices=DTYPE_CHOICES,
        default=AUTO,
        help="dtype of the stored weights (default: that of each tensor in the folder)",
    )
    return parser.parse_args(arguments)


def main() -> None:
    # A scheduler's SIGTERM cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    convert(**vars(parse_arguments()))


if __name__ == "__main__":
    run_command(main)
