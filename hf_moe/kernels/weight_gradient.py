"""Sums of outer products over each expert's rows: the gradients of both projections and of their biases.

Letters: N routed rows, O and I the two sides of a weight matrix, E experts.
"""

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from . import weight_gradient_hopper
from .descriptors import can_describe, dot_precision, programs
from .launching import launched
from .routing import Routing
from .tile_order import block_of
from .tuning import Tile, cdiv, power_of_2


@triton.jit
def _rows_of(x, row_ptr, first, last, at, column, COLUMNS, PER_TOKEN, TMA: tl.constexpr, GATHER: tl.constexpr,
             BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Rows first + at .. of an expert's rows, zero from `last` on, as (BR, BC)."""
    if TMA:
        return load_ragged(x, first, last - first, [at, column])
    else:
        n = first + at + tl.arange(0, BR)
        rows = n
        if GATHER:
            rows = tl.load(row_ptr + n, mask=n < last, other=0) // PER_TOKEN
        c = column + tl.arange(0, BC)
        mask = (n[:, None] < last) & (c[None, :] < COLUMNS)
        return tl.load(x + rows.to(tl.int64)[:, None] * COLUMNS + c[None, :], mask=mask, other=0.0)


@triton.jit
def _store_block(
    dw, dw_ptr, total, expert, out, column, N_OUT, N_IN, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    value = total.to(dw_ptr.dtype.element_ty)
    if TMA:
        # Two halves: the staging buffer is half as large, which leaves room for one more stage of loads.
        low, high = tl.split(value.reshape(BM, 2, BN // 2).permute(0, 2, 1))
        dw.store([expert, out, column], low.reshape(1, BM, BN // 2))
        dw.store([expert, out, column + BN // 2], high.reshape(1, BM, BN // 2))
    else:
        o = out + tl.arange(0, BM)[:, None]
        i = column + tl.arange(0, BN)[None, :]
        dw_ptrs = dw_ptr + expert.to(tl.int64) * N_OUT * N_IN + o.to(tl.int64) * N_IN + i
        tl.store(dw_ptrs, value, mask=(o < N_OUT) & (i < N_IN))


@launched
@triton.jit
def _weight_gradient_kernel(
    left,
    right,
    dw,
    dw_ptr,
    row_ptr,
    offset_ptr,
    E,
    N_OUT,
    N_IN,
    PER_TOKEN,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    LEFT_GATHER: tl.constexpr,
    RIGHT_GATHER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    out_tiles = tl.cdiv(N_OUT, BM)
    in_tiles = tl.cdiv(N_IN, BN)
    works = E * out_tiles * in_tiles
    if FLATTEN:
        # One pipeline over the steps of all tiles of this program: the next tile's rows load while this one is stored.
        zero = tl.program_id(0) * 0
        steps = zero
        for begin in range(tl.program_id(0), works, tl.num_programs(0) * 128):
            work = begin + tl.arange(0, 128) * tl.num_programs(0)
            expert = tl.minimum(work // (out_tiles * in_tiles), E - 1)
            rows = tl.load(offset_ptr + expert + 1) - tl.load(offset_ptr + expert)
            steps += tl.sum(tl.where(work < works, tl.maximum(tl.cdiv(rows, BK), 1), 0), 0)
        work = tl.program_id(0) - tl.num_programs(0)
        expert, out, column, first, last, at = zero, zero, zero, zero, zero, zero
        total = tl.zeros((BM, BN), tl.float32)
        for _ in tl.range(steps):
            if at + BK >= last - first:
                work += tl.num_programs(0)
                expert, out, column = block_of(tl.minimum(work, works - 1), E, out_tiles, in_tiles, BM, BN, GROUP)
                first = tl.load(offset_ptr + expert)
                last = tl.load(offset_ptr + expert + 1)
                at = 0
            else:
                at += BK
            left_tile = _rows_of(left, row_ptr, first, last, at, out, N_OUT, PER_TOKEN, LEFT_TMA, LEFT_GATHER, BK, BM)
            right_tile = _rows_of(
                right, row_ptr, first, last, at, column, N_IN, PER_TOKEN, RIGHT_TMA, RIGHT_GATHER, BK, BN
            )
            total = tl.dot(left_tile.T, right_tile, total, input_precision=PRECISION)
            if at + BK >= last - first:
                _store_block(dw, dw_ptr, total, expert, out, column, N_OUT, N_IN, STORE_TMA, BM, BN)
                total = tl.zeros((BM, BN), tl.float32)
    else:
        for work in range(tl.program_id(0), works, tl.num_programs(0)):
            expert, out, column = block_of(work, E, out_tiles, in_tiles, BM, BN, GROUP)
            first = tl.load(offset_ptr + expert)
            last = tl.load(offset_ptr + expert + 1)
            total = tl.zeros((BM, BN), tl.float32)
            for at in range(0, last - first, BK):
                left_tile = _rows_of(
                    left, row_ptr, first, last, at, out, N_OUT, PER_TOKEN, LEFT_TMA, LEFT_GATHER, BK, BM
                )
                right_tile = _rows_of(
                    right, row_ptr, first, last, at, column, N_IN, PER_TOKEN, RIGHT_TMA, RIGHT_GATHER, BK, BN
                )
                total = tl.dot(left_tile.T, right_tile, total, input_precision=PRECISION)
            _store_block(dw, dw_ptr, total, expert, out, column, N_OUT, N_IN, STORE_TMA, BM, BN)


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    tile: Tile,
    *,
    left_per_token: int | None = None,
    right_per_token: int | None = None,
) -> torch.Tensor:
    """The gradient of a grouped linear's weight.

        dw[e] = Σ left[n] ⊗ right[n]      over offset[e] <= n < offset[e + 1]

    Args:
        left: (N, O) rows sorted by expert or, with left_per_token, (T, O) tokens.
        right: (N, I) rows or, with right_per_token, (T, I) tokens. At most one side comes from tokens.
    Returns:
        dw_EOI in left's dtype, accumulated in fp32; exactly zero for an expert without rows.
    Cost: 2·N·O·I FLOPs, one launch; the zeros are written by the same launch.
    """
    E = routing.offset_E1.numel() - 1
    n_out, n_in = left.shape[1], right.shape[1]
    dw_EOI = left.new_empty((E, n_out, n_in))
    if weight_gradient_hopper.suits(left, right, tile):
        weight_gradient_hopper.product(
            left, right, routing, tile, dw_EOI, left_per_token=left_per_token, right_per_token=right_per_token
        )
        return dw_EOI
    left_tma = left_per_token is None and can_describe(left)
    right_tma = right_per_token is None and can_describe(right)
    store_tma = tile.tma_store and can_describe(dw_EOI)
    work = E * cdiv(n_out, tile.m) * cdiv(n_in, tile.n)
    _weight_gradient_kernel[(programs(tile, work, left.device),)](
        create_ragged_descriptor(left, [tile.k, tile.m]) if left_tma else left,
        create_ragged_descriptor(right, [tile.k, tile.n]) if right_tma else right,
        TensorDescriptor.from_tensor(dw_EOI, [1, tile.m, tile.n // 2]) if store_tma else None,
        dw_EOI,
        routing.row_N,
        routing.offset_E1,
        E,
        n_out,
        n_in,
        left_per_token or right_per_token or 1,
        LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma,
        STORE_TMA=store_tma,
        LEFT_GATHER=left_per_token is not None,
        RIGHT_GATHER=right_per_token is not None,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        GROUP=tile.group,
        FLATTEN=tile.flatten,
        PRECISION=dot_precision(left.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return dw_EOI


def weight_gradient_as(
    weight_EOI: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    tile: Tile,
    *,
    left_per_token: int | None = None,
    right_per_token: int | None = None,
) -> torch.Tensor:
    """`weight_gradient` in the memory order of the weight, so that accumulating it copies nothing."""
    if weight_EOI.stride(2) == 1:
        return weight_gradient(
            left, right, routing, tile, left_per_token=left_per_token, right_per_token=right_per_token
        )
    turned = weight_gradient(right, left, routing, tile, left_per_token=right_per_token, right_per_token=left_per_token)
    return turned.transpose(1, 2)


@launched
@triton.jit
def _bias_gradient_kernel(
    y_ptr,
    weight_ptr,
    row_ptr,
    offset_ptr,
    db_ptr,
    C,
    PER_TOKEN,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    expert = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.load(offset_ptr + expert)
    last = tl.load(offset_ptr + expert + 1)
    total = tl.zeros((BC,), tl.float32)
    for at in range(first, last, BR):
        n = at + tl.arange(0, BR)
        route = tl.load(row_ptr + n, mask=n < last, other=0)
        rows = route // PER_TOKEN if GATHER else n
        mask = (n[:, None] < last) & (c[None, :] < C)
        y = tl.load(y_ptr + rows.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + route, mask=n < last, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(y, 0)
    tl.store(db_ptr + expert.to(tl.int64) * C + c, total.to(db_ptr.dtype.element_ty), mask=c < C)


def bias_gradient(
    y: torch.Tensor, routing: Routing, *, per_token: int | None = None, weight_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of a grouped linear's bias: db[e] = Σ weight[n] · y[n] over the expert's rows, in fp32.

    Args:
        y: (N, C) rows sorted by expert or, with per_token, (T, C) tokens.
        weight_TK: a factor for each route; None for 1.
    """
    E, C = routing.offset_E1.numel() - 1, y.shape[1]
    db_EC = y.new_empty((E, C))
    block = min(power_of_2(C), 128)
    _bias_gradient_kernel[(E, cdiv(C, block))](
        y,
        y if weight_TK is None else weight_TK.contiguous(),
        routing.row_N,
        routing.offset_E1,
        db_EC,
        C,
        per_token or 1,
        GATHER=per_token is not None,
        WEIGHTED=weight_TK is not None,
        BR=32,
        BC=block,
    )
    return db_EC
