"""The plan of a conversion: every tensor of the target, where it comes from and where it will stand on disk.

Made from headers alone: no weights are read and torch is not needed. What a plan says is all that the later steps do.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from .families import Part
from .headers import ITEM_SIZE
from .options import Options

# Tensors that are computed before they are written: enough to keep all who hash them busy.
TENSORS_AHEAD = 4
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TargetTensor:
    """One tensor of the target: `rule` applied to `parts` of the source with `arguments`, stored as `dtype`.

    With `mean_of` = n above 1, every n parts are the same one of n sources, and their mean goes in.
    `layer` is the layer that it belongs to, None outside; sources are kept in memory for one layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: str
    parts: tuple[Part, ...]
    arguments: tuple[tuple[str, Any], ...]
    layer: int | None
    mean_of: int = 1

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file of the target: its header's bytes and the tensors in file order."""

    file: str
    header: bytes
    tensors: tuple[TargetTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A conversion, decided.

    Attributes:
        source, revision: what is converted. options: how.
        config: fields of the target's `HfMoeConfig`.
        shards: the target's weight files.
    """

    source: str
    revision: str | None
    family: str
    options: Options
    config: dict[str, Any]
    shards: tuple[Shard, ...]

    def tensors(self) -> Iterator[TargetTensor]:
        """All tensors, in the order in which they are written."""
        for shard in self.shards:
            yield from shard.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        """Numbers in all weight files."""
        return sum(prod(tensor.shape) for tensor in self.tensors())

    @property
    def item(self) -> int:
        """Bytes of a number in the target's type, which its cache has too."""
        return ITEM_SIZE[next(key for key, name in DTYPE_NAMES.items() if name == self.config["dtype"])]

    def index(self) -> dict[str, Any]:
        """Content of the index file."""
        weight_map = {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}
        total = sum(tensor.nbytes for tensor in self.tensors())
        return {
            "metadata": {"total_parameters": self.parameters, "total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }

    def digest(self, *more: Any) -> str:
        """SHA-256 of the plan and of whatever else must not change between two runs."""
        content = [asdict(tensor) for tensor in self.tensors()]
        text = json.dumps([self.config, self.options.to_dict(), content, more], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def pack(tensors: list[TargetTensor], options: Options) -> tuple[Shard, ...]:
    """Fill files up to the size limit, in order; a tensor above the limit has a file of its own."""
    groups: list[list[TargetTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > options.max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    for group in groups:
        offset = 0
        for tensor in group:
            if offset % ITEM_SIZE[tensor.dtype]:
                # Readers map tensors in place, so a wide type may not start at an odd address.
                group.sort(key=lambda tensor: -ITEM_SIZE[tensor.dtype])
                break
            offset += tensor.nbytes
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", shard_header(group), tuple(group))
        for i, group in enumerate(groups, 1)
    )


def shard_header(tensors: list[TargetTensor]) -> bytes:
    """The bytes before the first tensor: length, JSON, padded with spaces so that tensors start on 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
