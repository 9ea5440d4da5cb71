"""Which sorted row belongs to which expert, found on the device: a counting sort without synchronisation or atomics.

Letters: T tokens, K experts a token, N = T·K routes, E experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launching import launched
from .tuning import cdiv, power_of_2

# Up to here one launch sorts; beyond, counting every route in every program costs more than launches do.
ONE_LAUNCH = 4096


class Routing(NamedTuple):
    """The routes of a batch, sorted by expert, and the row tiles that grouped kernels walk through.

    row_N: int32, the route (token · K + choice) at each sorted row; routes of no expert come last.
    position_N: int32, the sorted row of each route, -1 for a route of no expert.
    offset_E1: int32 of length E + 1; expert e owns the sorted rows offset[e] .. offset[e + 1].
    tile: int32 (3·capacity + 1,): the expert, first row and end row of each tile, then how many tiles are in use.
    tile_rows: rows a tile.
    """

    row_N: torch.Tensor
    position_N: torch.Tensor
    offset_E1: torch.Tensor
    tile: torch.Tensor
    tile_rows: int

    @property
    def capacity(self) -> int:
        return self.tile.numel() // 3

    @property
    def max_tiles(self) -> int:
        """The most tiles that any distribution of the routes needs; known without looking at the device."""
        n_routes = self.row_N.numel()
        return min(cdiv(n_routes, self.tile_rows) + self.offset_E1.numel() - 1, n_routes)


# `Routing`'s tensors as the arguments of an operator.
ROUTING_SCHEMA = "Tensor row, Tensor position, Tensor offset, Tensor tile"


def tile_capacity(n_routes, n_experts):
    """Room for the lowest tiles there are: a compiled graph need not know which are chosen. Takes symbolic sizes."""
    return torch.sym_min((n_routes + 15) // 16 + n_experts, n_routes)


@triton.jit
def load_expert(index_ptr, n, N, E):
    expert = tl.load(index_ptr + n, mask=n < N, other=E).to(tl.int32)
    return tl.where((expert < 0) | (expert > E), E, expert)


@launched
@triton.jit(do_not_specialize=["N", "n_blocks"])
def _count_kernel(index_ptr, count_ptr, N, E, n_blocks, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    expert = load_expert(index_ptr, block * BLOCK + tl.arange(0, BLOCK), N, E)
    bins = tl.arange(0, BINS)
    tl.store(count_ptr + bins * n_blocks + block, tl.histogram(expert, BINS), mask=bins <= E)


@launched
@triton.jit(do_not_specialize=["n_blocks"])
def _scan_kernel(count_ptr, total_ptr, n_blocks, CHUNK: tl.constexpr):
    expert = tl.program_id(0)
    carry = tl.program_id(0) * 0
    for first in range(0, n_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        count_ptrs = count_ptr + expert * n_blocks + block
        count = tl.load(count_ptrs, mask=block < n_blocks, other=0)
        tl.store(count_ptrs, carry + tl.cumsum(count, 0) - count, mask=block < n_blocks)
        carry += tl.sum(count, 0)
    tl.store(total_ptr + expert, carry)


@triton.jit
def _place(
    program, index_ptr, before, total, row_ptr, position_ptr, offset_ptr, tile_ptr,
    N, E, n_blocks, n_tiles, capacity,
    BLOCK: tl.constexpr, BINS: tl.constexpr, TILE_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    bins = tl.arange(0, BINS)
    end = tl.cumsum(total, 0)
    begin = end - total
    if program < n_blocks:
        within = tl.arange(0, BLOCK)
        n = program * BLOCK + within
        expert = load_expert(index_ptr, n, N, E)
        earlier = (expert[:, None] == expert[None, :]) & (within[None, :] < within[:, None])
        position = tl.gather(begin + before, expert, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(row_ptr + position, n, mask=n < N)
        tl.store(position_ptr + n, tl.where(expert < E, position, -1), mask=n < N)
    else:
        # The programs behind the blocks of routes write the table of row tiles.
        tile = (program - n_blocks) * TILE_BLOCK + tl.arange(0, TILE_BLOCK)
        tiles = tl.where(bins < E, (total + TILE_ROWS - 1) // TILE_ROWS, 0)
        tile_end = tl.cumsum(tiles, 0)
        used = tl.sum(tiles, 0)
        owner = tl.minimum(tl.sum((tile[:, None] >= tile_end[None, :]).to(tl.int32), 1), E)
        first = tl.gather(begin, owner, 0) + (tile - tl.gather(tile_end - tiles, owner, 0)) * TILE_ROWS
        in_table = tile < n_tiles
        tl.store(tile_ptr + tile, owner, mask=in_table)
        tl.store(tile_ptr + capacity + tile, first, mask=in_table)
        tl.store(tile_ptr + 2 * capacity + tile, tl.gather(end, owner, 0), mask=in_table)
        if program == n_blocks:
            tl.store(tile_ptr + 3 * capacity, used)
            tl.store(offset_ptr + bins, begin, mask=bins <= E)


@launched
@triton.jit(do_not_specialize=["N", "n_blocks", "n_tiles", "capacity"])
def _place_kernel(
    index_ptr, before_ptr, total_ptr, row_ptr, position_ptr, offset_ptr, tile_ptr,
    N, E, n_blocks, n_tiles, capacity,
    BLOCK: tl.constexpr, BINS: tl.constexpr, TILE_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(total_ptr + bins, mask=bins <= E, other=0)
    block = tl.minimum(program, n_blocks - 1)
    before = tl.load(before_ptr + bins * n_blocks + block, mask=bins <= E, other=0)
    _place(
        program, index_ptr, before, total, row_ptr, position_ptr, offset_ptr, tile_ptr,
        N, E, n_blocks, n_tiles, capacity, BLOCK, BINS, TILE_BLOCK, TILE_ROWS,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["N", "n_blocks", "n_tiles", "capacity"])
def _route_kernel(
    index_ptr, row_ptr, position_ptr, offset_ptr, tile_ptr, N, E, n_blocks, n_tiles, capacity,
    BLOCK: tl.constexpr, BINS: tl.constexpr, TILE_BLOCK: tl.constexpr, TILE_ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Every program counts all routes again: for a few thousand that is less than two more launches cost.
    program = tl.program_id(0)
    first = tl.minimum(program, n_blocks) * BLOCK
    before = tl.zeros((BINS,), tl.int32)
    after = tl.zeros((BINS,), tl.int32)
    for start in range(0, N, CHUNK):
        n = start + tl.arange(0, CHUNK)
        expert = load_expert(index_ptr, n, N, E)
        # The last bin, which no expert has, takes what is not to be counted.
        before += tl.histogram(tl.where(n < first, expert, BINS - 1), BINS)
        after += tl.histogram(tl.where((n >= first) & (n < N), expert, BINS - 1), BINS)
    counted = tl.arange(0, BINS) <= E
    before = tl.where(counted, before, 0)
    total = before + tl.where(counted, after, 0)
    _place(
        program, index_ptr, before, total, row_ptr, position_ptr, offset_ptr, tile_ptr,
        N, E, n_blocks, n_tiles, capacity, BLOCK, BINS, TILE_BLOCK, TILE_ROWS,
    )  # fmt: skip


def route(index_TK: torch.Tensor, n_experts: int, tile_rows: int) -> Routing:
    """Sort routes by expert, stably, and cut each expert's rows into tiles.

        row[position[n]] = n      offset[e] = #{n : index[n] < e}

    Args:
        index_TK: int32 or int64 expert of each route. An id outside 0 .. E-1 (an expert-parallel sentinel) belongs
            to no expert: its row is sorted to the end and in no tile.
        n_experts: E.
        tile_rows: rows a tile, a power of two.
    Cost: one launch for up to ONE_LAUNCH routes, three beyond, with 4·N·(E / 32 + 6) bytes at most; no host
        synchronisation, no atomics: deterministic.
    """
    N, device = index_TK.numel(), index_TK.device
    block, tile_block = 128, 32
    n_blocks, capacity = cdiv(N, block), tile_capacity(N, n_experts)
    index_TK = index_TK.contiguous()
    sizes = (N, N, n_experts + 1, 3 * capacity + 1)
    row, position, offset, tile = found = [torch.empty(size, dtype=torch.int32, device=device) for size in sizes]
    routing = Routing(row, position, offset, tile, tile_rows)
    n_tiles = routing.max_tiles
    grid = (n_blocks + cdiv(n_tiles, tile_block),)
    # Two more bins than experts: routes of no expert, and what `_route_kernel` does not count.
    blocks = (block, power_of_2(n_experts + 2), tile_block, tile_rows)
    if N <= ONE_LAUNCH:
        chunk = min(max(power_of_2(N), block), 4096)
        _route_kernel[grid](
            index_TK, *found, N, n_experts, n_blocks, n_tiles, capacity, *blocks, chunk, num_warps=4 if N <= 1024 else 8
        )
        return routing
    scratch = torch.empty((n_experts + 1) * (n_blocks + 1), dtype=torch.int32, device=device)
    count, total = scratch[n_experts + 1 :], scratch
    _count_kernel[(n_blocks,)](index_TK, count, N, n_experts, n_blocks, block, blocks[1])
    _scan_kernel[(n_experts + 1,)](count, total, n_blocks, 1024)
    _place_kernel[grid](index_TK, count, total, *found, N, n_experts, n_blocks, n_tiles, capacity, *blocks)
    return routing
