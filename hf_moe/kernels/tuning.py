"""Tile choices as data: which block shapes each kernel uses on which GPU, and a rule for what no table lists.

Nothing is timed at the first call. `tune` times the candidates on this machine and writes a table that later processes read.
"""

import functools
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


def _wide(stages: int, **more) -> Tile:
    return Tile(128, 256, 64, 8, stages, **more)


# One program a multiprocessor, its tiles in one pipeline, results stored by the copy engine: the winner on every large shape.
_FLOW = _wide(4, per_sm=1, flatten=True, tma_store=True)
_ROWS = {0: Tile(16, 128, 128, 4, 4), 32: Tile(64, 256, 64, 4, 4, per_sm=1, flatten=True, tma_store=True), 96: _FLOW}
_SIDES = {0: Tile(128, 128, 64, 4, 3, per_sm=2, flatten=True, tma_store=True), 96: _FLOW}

# op → (rows an expert, at least) → tile, 16-bit operands on Hopper. Every op of a layer has the same m where it walks rows.
HOPPER: dict[str, dict[int, Tile]] = {
    "up": _ROWS,
    "up_inference": _ROWS,
    "up_rows": _ROWS | {1024: _wide(3)},
    "down": _ROWS,
    "gate_gradient": _ROWS,
    "x_gradient": _ROWS,
    "up_gradient": _SIDES,
    "down_gradient": _SIDES,
}


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own are slow on the host: its wrapper costs more than a kernel argument."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def hint(size) -> int:
    """A number for a possibly symbolic size."""
    if isinstance(size, torch.SymInt):
        return size.node.hint or 4096
    return size


@functools.lru_cache(maxsize=1024)
def choose(op: str, device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> Tile:
    """The tile of `op` for a layer whose experts own this many rows on average."""
    if device.type != "cuda":
        return Tile(16, 32, 32, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 3)
    return _at(HOPPER[op], rows_per_expert)


def _at(table: dict[int, Tile], rows: int) -> Tile:
    return table[max(least for least in table if least <= rows)]


def spreads(device: torch.device, width: int, training: bool) -> bool:
    """Whether the first projection reads copied rows (bulk copies) rather than gather its tokens.

    The copy costs time in proportion to the rows, the product gains some in proportion to rows times expert width: 635
    TFLOP/s against 530 when it also stores h, 643 against 597 when it does not (width 768).
    """
    return width >= (512 if training else 2048)
