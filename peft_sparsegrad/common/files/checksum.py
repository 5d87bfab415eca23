"""A checksum in the metadata of a safetensors file, against damage on the disk or on the way.

It is in the file that it is for, so it is replaced together with the tensors. A tool that saves changed tensors writes
metadata of its own, and leaves a file without a checksum, of which nothing is checked.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from .atomic import replacing

CHECKSUM = "peft_sparsegrad.crc32"  # key in the metadata
_METADATA = "__metadata__"
_PIECE = 1 << 22  # bytes that are read at a time


def add_checksum(path: str | os.PathLike[str]) -> None:
    """Write a checksum of the tensors, their names, shapes and dtypes into a safetensors file that has none."""
    with open(path, "rb") as source:
        header = _read_header(source)
        metadata = header.setdefault(_METADATA, {})
        if CHECKSUM in metadata:
            return
        start = source.tell()
        metadata[CHECKSUM] = _checksum(header, source)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the tensors must begin at a multiple of 8
        source.seek(start)
        with replacing(path) as partial, partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(_pieces(source))


def check_checksum(path: str | os.PathLike[str]) -> None:
    """Raise a ValueError if a valid safetensors file has a checksum that is not that of its tensors."""
    with open(path, "rb") as file:
        header = _read_header(file)
        expected = header.get(_METADATA, {}).get(CHECKSUM)
        if expected is not None and expected != (found := _checksum(header, file)):
            raise ValueError(
                f"{str(path)!r} is damaged: the checksum of its tensors is {found}, and was {expected} when they were "
                f"saved; save or download it again (whoever changed it on purpose removes {CHECKSUM!r} from its "
                "metadata)"
            )


def _read_header(file: BinaryIO) -> dict[str, Any]:
    return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def _checksum(header: dict[str, Any], rest: BinaryIO) -> str:
    """Return the checksum of the header without its metadata, and of the bytes that follow."""
    entries = {name: entry for name, entry in header.items() if name != _METADATA}
    checksum = zlib.crc32(json.dumps(entries, sort_keys=True).encode())
    for piece in _pieces(rest):
        checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece
