"""What safetensors files say about themselves, read without torch and without weights.

A safetensors file is: 8 bytes with the length of a JSON header, the header, then the tensors' bytes one after another.
"""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

ITEM_SIZE = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 1024 * 1024


@dataclass(frozen=True)
class TensorHeader:
    """Type, shape and place of one tensor: bytes `start` to `stop` of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Stored size."""
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Read the header of one safetensors file and check it against the file.

    Returns:
        Name → header, in file order, with absolute byte positions.
    Raises:
        ValueError: not a safetensors file, or header and file size disagree (truncated or corrupt).
    Cost: reads the header only.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path.name} is corrupt: {size} bytes, a safetensors file has at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{path.name} is truncated or corrupt: a header of {length} bytes in a file of {size}")
        return parse_header(path, file.read(length), size)


def parse_header(path: Path, header: bytes, size: int) -> dict[str, TensorHeader]:
    """As `read_header`, from the header's bytes and the file's size in bytes."""
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        base = 8 + len(header)
        tensors = {
            name: TensorHeader(
                entry["dtype"],
                tuple(entry["shape"]),
                path,
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path.name} is corrupt: its header is not that of a safetensors file") from error
    end = base
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        expected = prod(tensor.shape) * ITEM_SIZE.get(tensor.dtype, 0)
        if tensor.dtype not in ITEM_SIZE:
            raise ValueError(f"{path.name}: {name} has the type {tensor.dtype}, known are {', '.join(ITEM_SIZE)}")
        if tensor.start != end or tensor.nbytes != expected:
            raise ValueError(
                f"{path.name} is corrupt: {name} {tensor.dtype} {list(tensor.shape)} needs {expected} bytes at {end}, "
                f"its header says {tensor.nbytes} at {tensor.start}"
            )
        end = tensor.stop
    if end != size:
        raise ValueError(f"{path.name} is truncated or corrupt: its header promises {end} bytes, it has {size}")
    return tensors


def read_folder(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors of a checkpoint folder.

    As Transformers looks: `model.safetensors`, else the shards of the index. A folder with neither is the sum of its
    `*.safetensors` files.

    Raises:
        ValueError: no weights, only pickled ones, a shard missing, a path that leaves the folder, a damaged file, or an
            index that disagrees with its shards.
    """
    if (folder / WEIGHTS_NAME).is_file():
        # What stands beside it (Mistral's consolidated.safetensors, an adapter) is not the model's.
        return read_header(folder / WEIGHTS_NAME)
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        return _read_indexed(folder, index_path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({pickles[0]}); a pickle can run any code, so it is not read: "
                "save the model as safetensors first"
            )
        raise ValueError(f"{folder} holds no weights: no *.safetensors file")
    tensors: dict[str, TensorHeader] = {}
    for path in files:
        header = read_header(path)
        if twice := sorted(tensors.keys() & header.keys()):
            raise ValueError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {path.name}: an index must choose")
        tensors |= header
    return tensors


def _read_indexed(folder: Path, index_path: Path) -> dict[str, TensorHeader]:
    try:
        weight_map: dict[str, str] = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_path.name} is corrupt: no weight_map of names to files") from error
    tensors: dict[str, TensorHeader] = {}
    for shard in shards:
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise ValueError(f"{index_path.name} names {shard!r}, a path outside of the folder")
        if not shard.endswith(".safetensors"):
            raise ValueError(f"{index_path.name} names {shard}, which is not a safetensors file")
        if not (folder / shard).is_file():
            raise ValueError(f"{shard} is missing: {index_path.name} names {len(shards)} shards")
        present = read_header(folder / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if absent := sorted(listed - present.keys()):
            raise ValueError(f"{index_path.name} places {absent[0]} in {shard}, which does not hold it")
        # A tensor that the index leaves out is one that nobody reads: a stale copy must not shadow the listed one.
        tensors |= {name: header for name, header in present.items() if name in listed}
    return tensors
