"""A grouped linear with a low-rank term in the same sum.

    y[n] = weight[e] @ x[row] + b[e] @ z[n] + bias[e]      z[n] = a[e] @ x[row]

Letters: N routed rows, E experts, R rank, I and O input and output columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from .descriptors import can_describe, dot_precision, programs, row_descriptor, weight_descriptor
from .grouped_linear import dot_rows, tile_of
from .routing import Routing
from .tuning import Tile, cdiv, power_of_2


@triton.jit
def _adapted_linear_kernel(
    x,
    w,
    bias_ptr,
    z_ptr,
    b_ptr,
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
    IN_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.load(tile_ptr + 3 * capacity)
    columns = tl.cdiv(N_OUT, BN)
    for work in range(tl.program_id(0), tiles * columns, tl.num_programs(0)):
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
        rows = first + tl.arange(0, BM)
        out = column + tl.arange(0, BN)
        rank = tl.arange(0, BR)
        # One more step of the same sum, R deep: the adapter costs no pass over y.
        z_mask = (rows[:, None] < last) & (rank[None, :] < R)
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * R + rank[None, :], mask=z_mask, other=0.0)
        b_ptrs = b_ptr + expert.to(tl.int64) * b_stride_e + out[None, :] * b_stride_o + rank[:, None] * b_stride_r
        b = tl.load(b_ptrs, mask=(rank[:, None] < R) & (out[None, :] < N_OUT), other=0.0)
        total = tl.dot(z, b, total, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * N_OUT + out, mask=out < N_OUT, other=0.0)
            total += bias.to(tl.float32)[None, :]
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * N_OUT + out[None, :]
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < last) & (out[None, :] < N_OUT))


def adapted_linear(
    x: Tensor,
    weight_EOI: Tensor,
    z_NR: Tensor,
    b_EOR: Tensor,
    routing: Routing,
    tile: Tile,
    *,
    bias_EO: Tensor | None = None,
    per_token: int | None = None,
) -> Tensor:
    """A grouped linear and a low-rank term in one sum.

        y[n] = weight[e] @ x[row] + b[e] @ z[n] + bias[e]     row = n, or routing.row[n] // per_token when that is given

    Args:
        z_NR: usually a[e] @ x[row], in x's dtype, contiguous.
        b_EOR: x's dtype, any strides. The rest is as for `grouped_linear`.
    Returns:
        y_NO in x's dtype, accumulated in fp32. Rows of no expert stay unwritten.
    Cost: 2·N·O·(I + R) FLOPs, one launch.
    """
    _, n_out, n_in = weight_EOI.shape
    R = z_NR.shape[1]
    y_NO = x.new_empty((routing.row_N.numel(), n_out))
    in_first = weight_EOI.stride(2) != 1
    x_tma = per_token is None and can_describe(x)
    w_tma = can_describe(weight_EOI.transpose(1, 2) if in_first else weight_EOI)
    _adapted_linear_kernel[(programs(tile, routing.max_tiles * cdiv(n_out, tile.n), x.device),)](
        row_descriptor(x, tile.m, tile.k) if x_tma else x,
        weight_descriptor(weight_EOI, 1, tile.n, tile.k) if w_tma else weight_EOI,
        bias_EO,
        z_NR,
        b_EOR,
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
        *b_EOR.stride(),
        GATHER=per_token is not None,
        X_TMA=x_tma,
        W_TMA=w_tma,
        IN_FIRST=in_first,
        HAS_BIAS=bias_EO is not None,
        BM=tile.m,
        BN=tile.n,
        BK=tile.k,
        BR=max(16, power_of_2(R)),
        EVEN_K=n_in % tile.k == 0,
        GROUP=tile.group,
        PRECISION=dot_precision(x.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y_NO
