"""Read the settings (``args``, of its command line) that Megatron-LM stores with a checkpoint, without Megatron.

They are next to the tensors in a pickle, ``common.pt`` or the object ``common_state``. It is read without executing
anything: every class in it is replaced by one that does nothing (:func:`read_args`).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NoReturn

from torch.distributed.checkpoint.metadata import Metadata

from retemper.engine.errors import UserError
from retemper.engine.weights.damage import brief, file_inside
from retemper.engine.weights.dcp_metadata import check_pickle_size, placeholder_class

COMMON_FILE = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_MAX_FILE_BYTES = 256 << 20
_MAX_PICKLE_BYTES = 64 << 20
Args = Mapping[str, Any]


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._inert = placeholder_class()

    def find_class(self, module: str, name: str) -> Any:
        return self._inert

    def persistent_load(self, pid: Any) -> None:
        return None


def read_args(folder: Path, metadata: Metadata) -> dict[str, Any] | None:
    """Return the command line's settings in the Megatron checkpoint ``folder``, None if it has none.

    Values of unknown classes become inert objects. Nothing is executed.

    Raises:
        UserError: the file is outside ``folder``.
    """
    path = file_inside(folder, COMMON_FILE)
    try:
        if path.is_file():
            content = _unpickle(path.read_bytes()) if path.stat().st_size <= _MAX_FILE_BYTES else None
        else:
            content = _unpickle(_stored_object(folder, metadata))
    except Exception:  # Invalid pickles raise many types; the config must then come from elsewhere.
        return None
    content = content[0] if isinstance(content, list) and content else content
    args = content.get("args") if isinstance(content, dict) else None
    found = getattr(args, "__dict__", None)
    return dict(found) if found else None


def args_place(folder: Path) -> str:
    """Return the file or object of :func:`read_args`, for errors."""
    path = folder / COMMON_FILE
    return str(path if path.is_file() else folder)


def _stored_object(folder: Path, metadata: Metadata) -> bytes:
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == _COMMON_OBJECT)
    with open(file_inside(folder, place.relative_path), "rb") as file:
        file.seek(place.offset)
        return file.read(min(place.length, _MAX_FILE_BYTES))


def _unpickle(saved: bytes) -> Any:
    """Return the object written by ``torch.save``, without its tensors."""
    with zipfile.ZipFile(BytesIO(saved)) as archive:
        (member,) = (item for item in archive.infolist() if item.filename.split("/", 1)[-1] == "data.pkl")
        # torch.save does not compress: a forged archive could expand 64 KiB to a pickle of 64 MiB.
        if member.file_size > _MAX_PICKLE_BYTES or member.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError
        pickled = archive.read(member)
    check_pickle_size(pickled)
    return _InertUnpickler(BytesIO(pickled)).load()


def refuse(where: str, name: str, value: Any, supported: str) -> NoReturn:
    """Refuse a setting with which Megatron builds a model that no config can express.

    Raises:
        UserError: names the setting, and the supported values.
    """
    raise UserError(
        f"{where}: its args have {name} {shown(value)}, {supported}; config.json cannot express that model, "
        f"convert it with a tool that supports it{taking_away(where)}"
    )


def taking_away(where: str) -> str:
    """Return the remedy for stored settings that are wrong."""
    return f"; if these args are wrong, remove {COMMON_FILE} and name --config" if COMMON_FILE in where else ""


def shown(value: Any) -> str:
    """Return a value of a checkpoint for an error, which may be long."""
    text = brief(value)
    return text if len(text) <= 80 else text[:80] + "..."
