"""Multiply each sorted row by the matrix of the expert that owns it: the down-projection and both gradients of inputs.

Letters: N routed rows, I input columns, O output columns, E experts, R rank of an adapter.
"""

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices

from . import grouped_hopper
from .descriptors import can_describe, dot_precision, programs, row_descriptor, weight_descriptor
from .launching import launched
from .routing import Routing
from .row_products import NO_ADAPTER, Adapter, dot_rows
from .tile_order import tile_of
from .tuning import Tile, cdiv


@launched
@triton.jit(do_not_specialize=["capacity"])
def _grouped_linear_kernel(
    x,
    w,
    z,
    b,
    bias_ptr,
    y,
    y_ptr,
    row_ptr,
    tile_ptr,
    capacity,
    N_IN,
    N_OUT,
    R,
    PER_TOKEN,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    Y_TMA: tl.constexpr,
    IN_FIRST: tl.constexpr,
    ADAPTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
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
            z,
            b,
            row_ptr,
            expert,
            first,
            last,
            column,
            N_IN,
            N_OUT,
            R,
            PER_TOKEN,
            x_stride,
            w_stride_e,
            w_stride_o,
            w_stride_i,
            b_stride_e,
            b_stride_o,
            b_stride_r,
            GATHER,
            X_TMA,
            W_TMA,
            IN_FIRST,
            ADAPTED,
            1,
            BM,
            BN,
            BK,
            EVEN_K,
            PRECISION,
        )
        out = column + tl.arange(0, BN)
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
    if grouped_hopper.suits(x, weight_EOI, tile, bias=bias_EO, adapter=adapter):
        grouped_hopper.product(x, weight_EOI, routing, tile, y_NO, None, per_token=per_token)
        return y_NO
    in_first = weight_EOI.stride(2) != 1
    adapter = adapter and adapter.beside(in_first)
    described = adapter is None or adapter.described(in_first)
    x_tma = per_token is None and can_describe(x) and described
    w_tma = can_describe(weight_EOI.transpose(1, 2) if in_first else weight_EOI) and described
    y_tma = tile.tma_store and can_describe(y_NO)
    z, b, R, *b_strides = adapter.arguments(1, tile, x_tma, w_tma) if adapter else NO_ADAPTER
    _grouped_linear_kernel[(programs(tile, routing.max_tiles * cdiv(n_out, tile.n), x.device),)](
        row_descriptor(x, tile.m, tile.k) if x_tma else x,
        weight_descriptor(weight_EOI, 1, tile.n, tile.k) if w_tma else weight_EOI,
        z,
        b,
        bias_EO,
        create_ragged_descriptor(y_NO, [tile.m, tile.n // 2]) if y_tma else None,
        y_NO,
        routing.row_N,
        routing.tile,
        routing.capacity,
        n_in,
        n_out,
        R,
        per_token or 1,
        x.stride(0),
        *weight_EOI.stride(),
        *b_strides,
        GATHER=per_token is not None,
        X_TMA=x_tma,
        W_TMA=w_tma,
        Y_TMA=y_tma,
        IN_FIRST=in_first,
        ADAPTED=adapter is not None,
        HAS_BIAS=bias_EO is not None,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        EVEN_K=n_in % tile.k == 0,
        GROUP=tile.group,
        FLATTEN=tile.flatten,
        PRECISION=dot_precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_NO
