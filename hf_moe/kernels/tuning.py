"""Tile choices as data: which block shapes each kernel uses on which GPU, and a rule for what no table lists.

Nothing is timed at the first call. `tune` times the candidates on this machine and writes a table that later processes read.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The shape of a kernel's work.

    m, n, k: rows, columns and depth of a block. In a weight gradient, m and n are its two sides and k counts rows.
    warps, stages: warps a program, and blocks in flight between memory and the tensor cores.
    group: row tiles that share their columns' weights through L2 before the next ones start.
    per_sm: programs a multiprocessor, each looping over tiles; 0 launches one program a tile.
    flatten: one software pipeline over all tiles of a program, so that a tile's end overlaps the next one's start.
    tma_store: write the result through the bulk copy engine.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    per_sm: int = 0
    flatten: bool = False
    tma_store: bool = False


# op → (rows an expert, at least) → tile, 16-bit operands on Hopper. Every op of a layer has the same m where it walks rows.
HOPPER: dict[str, dict[int, Tile]] = {
    "up": {
        0: Tile(16, 128, 128, 4, 4),
        32: Tile(64, 256, 64, 4, 3),
        96: Tile(128, 256, 64, 8, 4),
    },
    "down": {
        0: Tile(16, 128, 128, 4, 4),
        32: Tile(64, 256, 64, 4, 3),
        96: Tile(128, 256, 64, 8, 3),
    },
    "gate_gradient": {
        0: Tile(16, 128, 128, 4, 4),
        32: Tile(64, 256, 64, 4, 3),
        96: Tile(128, 256, 64, 8, 3),
    },
    "x_gradient": {
        0: Tile(16, 128, 128, 4, 4),
        32: Tile(64, 256, 64, 4, 3),
        96: Tile(128, 256, 64, 8, 3),
    },
    "up_gradient": {0: Tile(128, 128, 32, 8, 3), 96: Tile(128, 256, 64, 8, 3)},
    "down_gradient": {0: Tile(128, 128, 32, 8, 3), 96: Tile(128, 256, 64, 8, 3)},
}


def hint(size) -> int:
    """A number for a possibly symbolic size."""
    if isinstance(size, torch.SymInt):
        return size.node.hint or 4096
    return size


def choose(op: str, device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> Tile:
    """The tile of `op` for a layer whose experts own this many rows on average."""
    if device.type != "cuda":
        return Tile(16, 32, 32, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    return _at(HOPPER[op], rows_per_expert)


def _at(table: dict[int, Tile], rows: int) -> Tile:
    return table[max(least for least in table if least <= rows)]


def spreads(device: torch.device) -> bool:
    """Whether weight gradients read copied rows (bulk copies on both sides) rather than gather tokens."""
    return True
