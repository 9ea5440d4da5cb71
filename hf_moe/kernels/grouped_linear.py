"""Multiply each sorted row by the matrix of the expert that owns it: the down-projection and both gradients of inputs.

Letters: N routed rows, I input columns, O output columns, E experts, R rank of an adapter, G groups of output columns
(gate and up: 2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices

from .descriptors import can_describe, dot_precision, programs, row_descriptor, weight_descriptor
from .routing import Routing
from .tuning import Tile, cdiv, power_of_2


@triton.jit
def tile_of(work, tiles, columns, GROUP: tl.constexpr):
    """Walk GROUP row tiles for each column tile, so that an expert's weights and rows meet in L2."""
    width = GROUP * columns
    first = (work // width) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    return first + (work % width) % height, (work % width) // height


@triton.jit
def dot_rows(
    x,
    w,
    row_ptr,
    expert,
    first,
    last,
    column,
    N_IN,
    GROUP_OUT,
    PER_TOKEN,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    IN_FIRST: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[first : first + BM] @ w[expert, G column groups].T in fp32; rows from `last` on are unspecified."""
    rows = first + tl.arange(0, BM)
    if not X_TMA:
        if GATHER:  # noqa: SIM108 Triton compiles only the branch taken of a constexpr `if`
            rows = tl.load(row_ptr + rows, mask=rows < last, other=0) // PER_TOKEN
        else:
            rows = tl.minimum(rows, last - 1)
        x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    out = tl.arange(0, BN)
    out_in_group = column + out % (BN // G)
    if not W_TMA:
        out = (out // (BN // G)) * GROUP_OUT + out_in_group
        w_columns = w + expert.to(tl.int64) * w_stride_e + out.to(tl.int64)[None, :] * w_stride_o
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, N_IN, BK):
        at = k + tl.arange(0, BK)
        if X_TMA:
            x_tile = x.load([first, k])
        elif EVEN_K:
            x_tile = tl.load(x_rows + at[None, :])
        else:
            x_tile = tl.load(x_rows + at[None, :], mask=at[None, :] < N_IN, other=0.0)
        if W_TMA:
            if IN_FIRST:
                w_tile = w.load([expert, k, 0, column]).reshape(BK, BN)
            else:
                w_tile = w.load([expert, 0, column, k]).reshape(BN, BK).T
        else:
            w_mask = (at[:, None] < N_IN) & (out_in_group[None, :] < GROUP_OUT)
            w_tile = tl.load(w_columns + at.to(tl.int64)[:, None] * w_stride_i, mask=w_mask, other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def low_rank_step(
    total,
    z_ptr,
    b_ptr,
    expert,
    first,
    last,
    out,
    out_mask,
    R,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    BM: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """total + z[first : first + BM] @ b[expert, out].T: an adapter as one more step of the same sum."""
    rows = first + tl.arange(0, BM)
    z_rows = z_ptr + rows.to(tl.int64)[:, None] * R
    b_columns = b_ptr + expert.to(tl.int64) * b_stride_e + out[None, :] * b_stride_o
    DEPTH: tl.constexpr = 64 if BR > 64 else BR
    for at in tl.static_range(0, BR, DEPTH):
        rank = at + tl.arange(0, DEPTH)
        z = tl.load(z_rows + rank[None, :], mask=(rows[:, None] < last) & (rank[None, :] < R), other=0.0)
        b = tl.load(b_columns + rank[:, None] * b_stride_r, mask=(rank[:, None] < R) & out_mask[None, :], other=0.0)
        total = tl.dot(z, b, total, input_precision=PRECISION)
    return total


class Adapter(NamedTuple):
    """A low-rank term of a grouped linear, y[n] += b[e] @ z[n]. z is usually a[e] @ x[row].

    z_NR: x's dtype, contiguous.
    b_EOR: x's dtype, any strides.
    """

    z_NR: torch.Tensor
    b_EOR: torch.Tensor

    @property
    def block(self) -> int:
        """The rank as a block's depth."""
        return max(16, power_of_2(self.z_NR.shape[1]))


def adapter_arguments(adapter: Adapter | None) -> tuple:
    """z, b, R and the strides of b, as the kernels take them."""
    if adapter is None:
        return None, None, 0, 0, 0, 0
    return adapter.z_NR, adapter.b_EOR, adapter.z_NR.shape[1], *adapter.b_EOR.stride()


@triton.jit
def _grouped_linear_kernel(
    x,
    w,
    bias_ptr,
    z_ptr,
    b_ptr,
    R,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    y,
    y_ptr,
    row_ptr,
    tile_ptr,
    capacity,
    N_IN,
    N_OUT,
    PER_TOKEN,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    Y_TMA: tl.constexpr,
    IN_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.load(tile_ptr + 3 * capacity)
    columns = tl.cdiv(N_OUT, BN)
    for work in tl.range(tl.program_id(0), tiles * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, column = tile_of(work, tiles, columns, GROUP)
        column *= BN
        expert = tl.load(tile_ptr + tile)
        first = tl.load(tile_ptr + capacity + tile)
        last = tl.load(tile_ptr + 2 * capacity + tile)
        total = dot_rows(
            x,
            w,
            row_ptr,
            expert,
            first,
            last,
            column,
            N_IN,
            N_OUT,
            PER_TOKEN,
            x_stride,
            w_stride_e,
            w_stride_o,
            w_stride_i,
            GATHER,
            X_TMA,
            W_TMA,
            IN_FIRST,
            1,
            BM,
            BN,
            BK,
            EVEN_K,
            PRECISION,
        )
        out = column + tl.arange(0, BN)
        if BR:
            total = low_rank_step(
                total,
                z_ptr,
                b_ptr,
                expert,
                first,
                last,
                out,
                out < N_OUT,
                R,
                b_stride_e,
                b_stride_o,
                b_stride_r,
                BM,
                BR,
                PRECISION,
            )
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * N_OUT + out, mask=out < N_OUT, other=0.0)
            total += bias.to(tl.float32)[None, :]
        if Y_TMA:
            # Two halves: the staging buffer is half as large, which leaves room for one more stage of loads.
            low, high = tl.split(total.to(y_ptr.dtype.element_ty).reshape(BM, 2, BN // 2).permute(0, 2, 1))
            c0, c1, c2 = to_ragged_indices(first, last - first, 0)
            y.store([c0, c1, c2, column], low.reshape(1, 1, BM, BN // 2))
            y.store([c0, c1, c2, column + BN // 2], high.reshape(1, 1, BM, BN // 2))
        else:
            rows = first + tl.arange(0, BM)
            y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N_OUT + out[None, :]
            mask = (rows[:, None] < last) & (out[None, :] < N_OUT)
            tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def grouped_linear(
    x: torch.Tensor,
    weight_EOI: torch.Tensor,
    routing: Routing,
    tile: Tile,
    *,
    bias_EO: torch.Tensor | None = None,
    adapter: Adapter | None = None,
    per_token: int | None = None,
    zero_unowned: bool = False,
) -> torch.Tensor:
    """Multiply each sorted row by the matrix of the expert that owns it.

        y[n] = weight[e] @ x[row] + b[e] @ z[n] + bias[e]     row = n, or routing.row[n] // per_token when that is given

    Args:
        x: (N, I) rows sorted by expert or, with per_token, (T, I) tokens; fp32, bf16 or fp16, contiguous in I.
        weight_EOI: x's dtype, any strides (a transposed view costs nothing).
        routing: from `route`, with tiles of tile.m rows.
        bias_EO: contiguous.
        adapter: z and b, for a term of low rank in the same sum.
        zero_unowned: write zeros for rows of no expert; otherwise they stay unwritten.
    Returns:
        y_NO in x's dtype, accumulated in fp32.
    Cost: 2·N·O·(I + R) FLOPs, one launch, no host synchronisation.
    Source: dropless grouped computation, arXiv:2211.15841; gather fused as in arXiv:2403.08245.
    """
    _, n_out, n_in = weight_EOI.shape
    N = routing.row_N.numel()
    allocate = x.new_zeros if zero_unowned else x.new_empty
    y_NO = allocate((N, n_out))
    in_first = weight_EOI.stride(2) != 1
    x_tma = per_token is None and can_describe(x)
    w_tma = can_describe(weight_EOI.transpose(1, 2) if in_first else weight_EOI)
    y_tma = tile.tma_store and can_describe(y_NO)
    _grouped_linear_kernel[(programs(tile, routing.max_tiles * cdiv(n_out, tile.n), x.device),)](
        row_descriptor(x, tile.m, tile.k) if x_tma else x,
        weight_descriptor(weight_EOI, 1, tile.n, tile.k) if w_tma else weight_EOI,
        bias_EO,
        *adapter_arguments(adapter),
        create_ragged_descriptor(y_NO, [tile.m, tile.n // 2]) if y_tma else None,
        y_NO,
        routing.row_N,
        routing.tile,
        routing.capacity,
        n_in,
        n_out,
        per_token or 1,
        x.stride(0),
        *weight_EOI.stride(),
        GATHER=per_token is not None,
        X_TMA=x_tma,
        W_TMA=w_tma,
        Y_TMA=y_tma,
        IN_FIRST=in_first,
        HAS_BIAS=bias_EO is not None,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        BR=adapter.block if adapter else 0,
        EVEN_K=n_in % tile.k == 0,
        GROUP=tile.group,
        FLATTEN=tile.flatten,
        PRECISION=dot_precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_NO
