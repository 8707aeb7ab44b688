"""The ``.idx``/``.bin`` layout as Megatron-LM publishes it, read and written number by number with ``struct``.

Written from the layout's table alone and slow on purpose: what it gives is plain Python lists.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

TOKEN_FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


@dataclass
class MegatronIndex:
    """Everything the two files say."""

    code: int
    lengths: list[int]
    pointers: list[int]
    document_indices: list[int]
    sequences: list[list[int]]

    @property
    def documents(self) -> list[list[list[int]]]:
        """For each document, its sequences."""
        edges = zip(self.document_indices[:-1], self.document_indices[1:], strict=True)
        return [self.sequences[first:last] for first, last in edges]


def read_megatron(prefix: Path | str) -> MegatronIndex:
    """Read ``{prefix}.idx`` and ``.bin``, and require every byte of both to be accounted for."""
    index = Path(f"{prefix}.idx").read_bytes()
    tokens = Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack("<Q", index[9:17])
    assert version == 1
    code = index[17]
    (num_sequences,) = struct.unpack("<Q", index[18:26])
    (num_indices,) = struct.unpack("<Q", index[26:34])
    at = 34
    lengths = [struct.unpack("<i", index[at + 4 * i : at + 4 * i + 4])[0] for i in range(num_sequences)]
    at += 4 * num_sequences
    pointers = [struct.unpack("<q", index[at + 8 * i : at + 8 * i + 8])[0] for i in range(num_sequences)]
    at += 8 * num_sequences
    document_indices = [struct.unpack("<q", index[at + 8 * i : at + 8 * i + 8])[0] for i in range(num_indices)]
    at += 8 * num_indices
    assert at == len(index)
    letter = TOKEN_FORMATS[code]
    width = struct.calcsize(f"<{letter}")
    sequences = [
        list(struct.unpack(f"<{length}{letter}", tokens[pointer : pointer + length * width]))
        for length, pointer in zip(lengths, pointers, strict=True)
    ]
    assert sum(lengths) * width == len(tokens)
    return MegatronIndex(code, lengths, pointers, document_indices, sequences)


def write_megatron(prefix: Path | str, documents: list[list[list[int]]], code: int, modes: bool = False) -> None:
    """Write documents, each a list of sequences, as Megatron-LM would; with ``modes``, its multimodal variant."""
    letter = TOKEN_FORMATS[code]
    width = struct.calcsize(f"<{letter}")
    sequences = [sequence for document in documents for sequence in document]
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1))
        for sequence in sequences:
            file.write(struct.pack("<i", len(sequence)))
        pointer = 0
        for sequence in sequences:
            file.write(struct.pack("<q", pointer))
            pointer += len(sequence) * width
        index = 0
        file.write(struct.pack("<q", index))
        for document in documents:
            index += len(document)
            file.write(struct.pack("<q", index))
        if modes:
            file.write(bytes(len(sequences)))
