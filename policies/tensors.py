"""Weights of a bundle: a safetensors file, read by its specification and nothing beyond it.

The file is a length (8 bytes, little-endian), a header of that length in JSON, then the tensors' bytes. The reader of
the safetensors library takes repeated keys, metadata and any dtype; here all of that is refused, and nothing is
allocated before the header has been compared with what the manifest says the network is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import safetensors.numpy

from trimtab.errors import BundleError, UserError
from trimtab.policies.defects import Refuse, at_once, refuse_all
from trimtab.policies.strict_json import read_object, short

Shapes = Mapping[str, tuple[int, ...]]
MOST_HEADER = 64 << 10  # bytes; a tensor takes about 100
ENTRY = ("dtype", "shape", "data_offsets")


def write_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The content of a safetensors file, without metadata."""
    return safetensors.numpy.save(dict(tensors))


def read_tensors(content: bytes, wanted: Shapes, where: str, refuse: Refuse = at_once) -> dict[str, np.ndarray]:
    """Reads a safetensors file that must hold exactly the wanted tensors, float32 and finite.

    Args:
        content: of the file.
        wanted: name to shape.
        where: the path of the file, for messages.
        refuse: called with each defect after which there is something left to check.

    Returns:
        Name to read-only array.

    Raises:
        BundleError: names the tensor that is missing, unknown, of another dtype or shape, or not finite, or says what
            is wrong with the header: its length, its JSON, bytes that belong to no tensor or to two.
    """
    header, data = _split(content, where)
    entries = read_object(header, inside := f"{where}: not a safetensors file: its header")
    if header.rstrip(b" ") != json.dumps(entries, separators=(",", ":")).encode():
        refuse(BundleError(f"{inside}: not in canonical form; the file was changed after it was saved"))
    problems: list[UserError] = [
        BundleError(f"{where}: tensor {short(name)} is {'missing' if name in wanted else 'unknown'}")
        for name in sorted(wanted.keys() ^ entries.keys())
    ]
    ranges: dict[str, tuple[int, int]] = {}
    for name in sorted(wanted.keys() & entries.keys()):
        try:
            ranges[name] = _range(name, entries[name], wanted[name], where)
        except BundleError as error:
            problems.append(error)
    refuse_all(problems, refuse)
    _check_cover(ranges, len(data), where)
    arrays = {
        name: np.frombuffer(data[first:last], dtype="<f4").reshape(wanted[name])
        for name, (first, last) in ranges.items()
    }
    odd = sorted(name for name, array in arrays.items() if not np.isfinite(array).all())
    refuse_all([BundleError(f"{where}: {name} holds a number that is not finite") for name in odd], refuse)
    return arrays


def _split(content: bytes, where: str) -> tuple[bytes, memoryview]:
    """The header and the data; both lie wholly in the file."""
    if len(content) < 8:
        raise BundleError(f"{where}: not a safetensors file: {len(content)} bytes, fewer than the 8 of a length")
    length, most = int.from_bytes(content[:8], "little"), min(MOST_HEADER, len(content) - 8)
    if length > most:
        raise BundleError(f"{where}: not a safetensors file: a header of {length} bytes; at most {most} can be here")
    return content[8 : 8 + length], memoryview(content)[8 + length :]


def _range(name: str, entry: Any, shape: tuple[int, ...], where: str) -> tuple[int, int]:
    """First and last byte of a tensor, whose entry in the header must be as expected."""
    if not isinstance(entry, dict) or set(entry) != set(ENTRY):
        keys = sorted(entry) if isinstance(entry, dict) else entry
        raise BundleError(f"{where}: {name} is described by {short(keys)}; it must be {', '.join(ENTRY)}")
    if entry["dtype"] != "F32" or not _are_whole(entry["shape"]) or tuple(entry["shape"]) != shape:
        raise BundleError(
            f"{where}: {name} is {short(entry['dtype'])} of shape {short(entry['shape'])}; "
            f"it must be 'F32' of shape {list(shape)}"
        )
    offsets = entry["data_offsets"]
    if not _are_whole(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != 4 * prod(shape):
        raise BundleError(f"{where}: {name} has data_offsets {short(offsets)}; it must have {4 * prod(shape)} bytes")
    return offsets[0], offsets[1]


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_cover(ranges: Mapping[str, tuple[int, int]], size: int, where: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    end = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != end:
            what = "overlaps the tensor before it" if first < end else "leaves bytes before it that are no tensor's"
            raise BundleError(f"{where}: data_offsets of {name}: [{first}, {last}] {what}")
        end = last
    if end != size:
        raise BundleError(f"{where}: the tensors have {end} bytes; the file holds {size}")
