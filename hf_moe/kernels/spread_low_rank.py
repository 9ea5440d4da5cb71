"""Each token's rows, and an adapter's narrow product of them, while they pass.

    y[n] = x[row[n] // K]        z[n] = a[e] @ y[n]

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, E experts, R rank.
"""

import torch
import triton
import triton.language as tl

from .descriptors import dot_precision
from .launching import launched
from .routing import Routing
from .tuning import Tile, cdiv, power_of_2


@launched
@triton.jit
def _spread_low_rank_kernel(
    x_ptr,
    a_ptr,
    y_ptr,
    z_ptr,
    row_ptr,
    offset_ptr,
    E,
    D,
    R,
    K,
    x_stride,
    a_stride_e,
    a_stride_r,
    a_stride_d,
    STORE: tl.constexpr,
    BINS: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tile j of every expert before tile j + 1 of any: rows are in token order, so their tokens meet in L2.
    bins = tl.arange(0, BINS)
    begins = tl.load(offset_ptr + bins, mask=bins < E, other=0)
    ends = tl.load(offset_ptr + bins + 1, mask=bins < E, other=0)
    tiles = (ends - begins + BM - 1) // BM
    work = tl.program_id(0)
    j = work * 0
    for bit in tl.static_range(BITS - 1, -1, -1):
        j += tl.where(tl.sum(tl.minimum(tiles, j + (1 << bit)), 0) <= work, 1 << bit, 0)
    more = (tiles > j).to(tl.int32)
    place = work - tl.sum(tl.minimum(tiles, j), 0)
    chosen = (more == 1) & (tl.cumsum(more, 0) == place + 1)
    first = tl.sum(tl.where(chosen, begins, 0), 0) + j * BM
    last = tl.sum(tl.where(chosen, ends, 0), 0)
    expert = tl.sum(tl.where(chosen, bins, 0), 0).to(tl.int64)

    n = first + tl.arange(0, BM)
    owned = n < last
    token = tl.load(row_ptr + n, mask=owned, other=0) // K
    r = tl.arange(0, BR)
    x_rows = x_ptr + token.to(tl.int64)[:, None] * x_stride
    a_rows = a_ptr + expert * a_stride_e + r[None, :] * a_stride_r
    z = tl.zeros((BM, BR), tl.float32)
    # Programs behind the last tile have nothing to do.
    for k in range(0, tl.where(first < last, D, 0), BK):
        d = k + tl.arange(0, BK)
        mask = owned[:, None] & (d[None, :] < D)
        x = tl.load(x_rows + d[None, :], mask=mask, other=0.0)
        a = tl.load(a_rows + d[:, None] * a_stride_d, mask=(d[:, None] < D) & (r[None, :] < R), other=0.0)
        if STORE:
            tl.store(y_ptr + n.to(tl.int64)[:, None] * D + d[None, :], x, mask=mask)
        # The select makes the loop wait for each product. Triton gives rows that are stored as well as multiplied one
        # buffer too few to leave a product running: the next rows would be copied over those that it still reads.
        z = tl.where(owned[:, None], tl.dot(x, a, z, input_precision=PRECISION), 0.0)
    z_ptrs = z_ptr + n.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=owned[:, None] & (r[None, :] < R))


def spread_low_rank(
    x_TD: torch.Tensor, a_ERD: torch.Tensor, routing: Routing, K: int, tile: Tile
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy each token to its rows and multiply these by their expert's narrow matrix.

        y[position[t, k]] = x[t]        z[n] = a[e] @ y[n]

    Args:
        a_ERD: x's dtype, any strides.
        tile: m rows and k columns at a time.
    Returns:
        (y_ND, z_NR), both in x's dtype. Rows of no expert stay unwritten.
    Cost: 2·N·D·R FLOPs; writes N·D. A token comes from memory once, and from L2 for its other experts.
    """
    y_ND = x_TD.new_empty((routing.row_N.numel(), x_TD.shape[1]))
    return y_ND, _launch(x_TD, a_ERD, y_ND, routing, K, tile)


def low_rank_of_tokens(x_TD: torch.Tensor, a_ERD: torch.Tensor, routing: Routing, K: int, tile: Tile) -> torch.Tensor:
    """z_NR of `spread_low_rank` alone, which then writes nothing of width D."""
    return _launch(x_TD, a_ERD, None, routing, K, tile)


def _launch(x_TD, a_ERD, y_ND: torch.Tensor | None, routing: Routing, K: int, tile: Tile) -> torch.Tensor:
    N, D = routing.row_N.numel(), x_TD.shape[1]
    E, R, _ = a_ERD.shape
    z_NR = x_TD.new_empty((N, R))
    _spread_low_rank_kernel[(min(cdiv(N, tile.m) + E, N),)](
        x_TD,
        a_ERD,
        y_ND,
        z_NR,
        routing.row_N,
        routing.offset_E1,
        E,
        D,
        R,
        K,
        x_TD.stride(0),
        *a_ERD.stride(),
        STORE=y_ND is not None,
        BINS=power_of_2(E),
        BITS=cdiv(N, tile.m).bit_length(),
        BM=tile.m,
        BK=tile.k,
        BR=max(16, power_of_2(R)),
        PRECISION=dot_precision(x_TD.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return z_NR
