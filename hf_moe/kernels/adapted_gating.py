"""The gate's gradient, and both adapters' products with what it just wrote.

    dh[n] = w[n] · da[n] · ∂a/∂h[n]             dw[n] = ⟨da[n], a[n]⟩
    up_dz[n] = up_b[e].T @ dh[n]                aa[n] = down_a[e] @ (w[n] · a[n])
    dup_b[e] = Σ dh[n] ⊗ z[n]                   ddown_a[e] = Σ dz[n] ⊗ w[n] · a[n]

Letters: N routed rows, F expert width, H columns of the first projection (2F when gated, F when not), E experts,
R and S the ranks of the first and of the second projection's adapter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .descriptors import dot_precision
from .gating import Gating, gate_gradient
from .launching import launched
from .routing import Routing
from .tuning import Tile, cdiv, power_of_2


@triton.jit
def _chunk(offset_ptr, chunk, E, BINS: tl.constexpr, ROWS: tl.constexpr):
    """The expert, first and end row of a chunk of at most ROWS of one expert's rows; an empty one behind the last."""
    bins = tl.arange(0, BINS)
    begin = tl.load(offset_ptr + bins, mask=bins < E, other=0)
    end = tl.load(offset_ptr + bins + 1, mask=bins < E, other=0)
    chunks = (end - begin + ROWS - 1) // ROWS
    before = tl.cumsum(chunks, 0) - chunks
    mine = (chunk >= before) & (chunk < before + chunks)
    first = tl.sum(tl.where(mine, begin + (chunk - before) * ROWS, 0), 0)
    last = tl.minimum(tl.sum(tl.where(mine, end, 0), 0), first + ROWS)
    return tl.sum(tl.where(mine, bins, 0), 0), first, last


@triton.jit
def _narrow_products(
    rows_ptr,
    WIDTH,
    factor_ptrs,
    factor_stride,
    narrow,
    part_ptrs,
    R,
    first,
    last,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """rows @ factor, and rows.T @ narrow into parts, while the rows of one chunk pass once."""
    n = first + tl.arange(0, BM)
    row_ptrs = rows_ptr + n.to(tl.int64)[:, None] * WIDTH
    r = tl.arange(0, BR)[None, :]
    product = tl.zeros((BM, BR), tl.float32)
    for at in range(0, WIDTH, BC):
        c = at + tl.arange(0, BC)
        mask = (c[:, None] < WIDTH) & (r < R)
        rows = tl.load(row_ptrs + c[None, :], mask=(n[:, None] < last) & (c[None, :] < WIDTH), other=0.0)
        factor = tl.load(factor_ptrs + c[:, None] * factor_stride, mask=mask, other=0.0)
        product = tl.dot(rows, factor, product, input_precision=PRECISION)
        tl.store(part_ptrs + c[:, None] * R + r, tl.dot(rows.T, narrow, input_precision=PRECISION), mask=mask)
    return product


@launched
@triton.jit
def _adapted_gating_kernel(
    h_ptr,
    da_ptr,
    weight_ptr,
    row_ptr,
    offset_ptr,
    dout_ptr,
    bias_ptr,
    z_ptr,
    up_b_ptr,
    dz_ptr,
    down_a_ptr,
    dh_ptr,
    dweight_ptr,
    up_dz_ptr,
    aa_ptr,
    part_b_ptr,
    part_a_ptr,
    E,
    F,
    D,
    K,
    R,
    S,
    up_b_stride_e,
    up_b_stride_o,
    up_b_stride_r,
    down_a_stride_e,
    down_a_stride_r,
    down_a_stride_f,
    alpha,
    limit,
    up_offset,
    ACT: tl.constexpr,
    CLIP: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    BINS: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    BS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0)
    expert, first, last = _chunk(offset_ptr, chunk, E, BINS, BM)
    if first >= last:
        return
    FAN: tl.constexpr = 2 if GATED else 1
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    expert = expert.to(tl.int64)
    chunk = chunk.to(tl.int64)
    dtype = dh_ptr.dtype.element_ty
    for at in range(first, last, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        owned = n < last
        n64 = n.to(tl.int64)[:, None]
        route = tl.load(row_ptr + n, mask=owned, other=0)
        weight = tl.load(weight_ptr + route, mask=owned, other=0.0).to(tl.float32)[:, None]
        dweight = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, F, BLOCK_F):
            f = begin + tl.arange(0, BLOCK_F)[None, :]
            mask = owned[:, None] & (f < F)
            da = tl.load(da_ptr + n64 * F + f, mask=mask, other=0.0).to(tl.float32)
            gate_at = n64 * (FAN * F) + STEP * f
            up_at = gate_at + (1 if INTERLEAVED else F)
            gate = tl.load(h_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(h_ptr + up_at, mask=mask, other=0.0).to(tl.float32) if GATED else gate
            dgate, dup, a = gate_gradient(gate, up, weight * da, alpha, limit, up_offset, ACT, CLIP, GATED)
            tl.store(dh_ptr + gate_at, dgate.to(dtype), mask=mask)
            if GATED:
                tl.store(dh_ptr + up_at, dup.to(dtype), mask=mask)
            if DOWN:
                tl.store(da_ptr + n64 * F + f, (weight * a).to(dtype), mask=mask)
            dweight += tl.sum(da * a, 1)
        if HAS_BIAS:
            for begin in range(0, D, BLOCK_D):
                d = begin + tl.arange(0, BLOCK_D)
                dout_ptrs = dout_ptr + (route // K).to(tl.int64)[:, None] * D + d[None, :]
                dout = tl.load(dout_ptrs, mask=owned[:, None] & (d[None, :] < D), other=0.0).to(tl.float32)
                bias = tl.load(bias_ptr + expert * D + d, mask=d < D, other=0.0).to(tl.float32)
                dweight += tl.sum(dout * bias[None, :], 1)
        tl.store(dweight_ptr + route, dweight.to(dweight_ptr.dtype.element_ty), mask=owned)
    # The rows that this program wrote are still in L2.
    tl.debug_barrier()
    n = first + tl.arange(0, BM)
    n64 = n.to(tl.int64)[:, None]
    if UP:
        r = tl.arange(0, BR)[None, :]
        mask = (n[:, None] < last) & (r < R)
        z = tl.load(z_ptr + n64 * R + r, mask=mask, other=0.0)
        b_ptrs = up_b_ptr + expert * up_b_stride_e + r * up_b_stride_r
        part_ptrs = part_b_ptr + chunk * (FAN * F * R)
        up_dz = _narrow_products(
            dh_ptr, FAN * F, b_ptrs, up_b_stride_o, z, part_ptrs, R, first, last, BM, BC, BR, PRECISION
        )
        tl.store(up_dz_ptr + n64 * R + r, up_dz.to(dtype), mask=mask)
    if DOWN:
        s = tl.arange(0, BS)[None, :]
        mask = (n[:, None] < last) & (s < S)
        dz = tl.load(dz_ptr + n64 * S + s, mask=mask, other=0.0)
        a_ptrs = down_a_ptr + expert * down_a_stride_e + s * down_a_stride_r
        part_ptrs = part_a_ptr + chunk * (F * S)
        aa = _narrow_products(da_ptr, F, a_ptrs, down_a_stride_f, dz, part_ptrs, S, first, last, BM, BC, BS, PRECISION)
        tl.store(aa_ptr + n64 * S + s, aa.to(dtype), mask=mask)


@launched
@triton.jit
def _sum_parts_kernel(
    part_ptr,
    offset_ptr,
    out_ptr,
    E,
    SIZE,
    RANK,
    TURNED: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[e] = Σ parts of the expert's chunks, or its transpose; zero for an expert without rows."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    begin = tl.load(offset_ptr + bins, mask=bins < E, other=0)
    end = tl.load(offset_ptr + bins + 1, mask=bins < E, other=0)
    chunks = (end - begin + ROWS - 1) // ROWS
    before = tl.sum(tl.where(bins < expert, chunks, 0), 0)
    mine = tl.sum(tl.where(bins == expert, chunks, 0), 0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = part_ptr + before.to(tl.int64) * SIZE + at
    for _ in range(mine):
        total += tl.load(part_ptrs, mask=at < SIZE, other=0.0)
        part_ptrs += SIZE
    out_at = (at % RANK) * (SIZE // RANK) + at // RANK if TURNED else at
    tl.store(out_ptr + expert.to(tl.int64) * SIZE + out_at, total.to(out_ptr.dtype.element_ty), mask=at < SIZE)


def _sum_parts(
    part_CIR: torch.Tensor, routing: Routing, rows: int, dtype: torch.dtype, turned: bool = False
) -> torch.Tensor:
    _, columns, rank = part_CIR.shape
    E, size = routing.offset_E1.numel() - 1, columns * rank
    out = torch.empty((E, rank, columns) if turned else (E, columns, rank), dtype=dtype, device=part_CIR.device)
    _sum_parts_kernel[(E, cdiv(size, 1024))](
        part_CIR, routing.offset_E1, out, E, size, rank, TURNED=turned, BINS=power_of_2(E), ROWS=rows, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return out


class AdaptedGatingGradient(NamedTuple):
    """What `adapted_gating_gradient` found; None for an adapter that is not there."""

    dh_NH: torch.Tensor
    dweight_TK: torch.Tensor
    up_dz_NR: torch.Tensor | None
    dup_b_EHR: torch.Tensor | None
    aa_NS: torch.Tensor | None
    ddown_a_ESF: torch.Tensor | None


def adapted_gating_gradient(
    h_NH: torch.Tensor,
    da_NF: torch.Tensor,
    weight_TK: torch.Tensor,
    routing: Routing,
    gating: Gating,
    tile: Tile,
    *,
    up: tuple[torch.Tensor, torch.Tensor] | None,
    down: tuple[torch.Tensor, torch.Tensor] | None,
    dout_TD: torch.Tensor,
    bias_ED: torch.Tensor | None,
) -> AdaptedGatingGradient:
    """`gating_gradient`, then the narrow products of both adapters' backward while its results are in L2: see above.

    Args:
        h_NH, weight_TK, gating, dout_TD, bias_ED: as for `gating_gradient`.
        da_NF: the gradient of a for each row, without the routing weight. It is overwritten.
        tile: m rows of one expert a program, n columns at a time.
        up: (z_NR, up_b_EHR), the first projection's adapter. down: (dz_NS, down_a_ESF), the second one's, with
            dz = down_b.T @ dout. Any strides for the factors; at least one of the two is given.
    Returns:
        dh, dw and of each adapter what its remaining gradients are made of: see above. dw is exactly zero for a route
        of no expert. Sums over rows are kept in fp32, a part for each tile.m rows, then summed in their order.
    Cost: `gating_gradient`'s bytes, and 8·(H·R + F·S) for each tile.m rows of parts. For small ranks: the parts grow
        with it, where separate products read 12·N·F bytes more at any rank.
    """
    N, F = da_NF.shape
    E, K = routing.offset_E1.numel() - 1, weight_TK.shape[1]
    R, S = up[0].shape[1] if up else 0, down[0].shape[1] if down else 0
    chunks = min(cdiv(N, tile.m) + E, N)
    block_f = min(max(power_of_2(F), 16), 256)
    block_n = min(tile.m, max(1, 16 * 32 * tile.warps // block_f))
    dh_NH = torch.empty_like(h_NH)
    # Routes of no expert are in no chunk.
    dweight_TK = torch.zeros_like(weight_TK, memory_format=torch.contiguous_format)
    up_dz_NR = part_b = aa_NS = part_a = None
    if up:
        up_dz_NR = torch.empty_like(up[0])
        part_b = torch.empty((chunks, h_NH.shape[1], R), dtype=torch.float32, device=h_NH.device)
    if down:
        aa_NS = torch.empty_like(down[0])
        part_a = torch.empty((chunks, F, S), dtype=torch.float32, device=h_NH.device)
    _adapted_gating_kernel[(chunks,)](
        h_NH,
        da_NF,
        weight_TK.contiguous(),
        routing.row_N,
        routing.offset_E1,
        dout_TD,
        bias_ED,
        *(up or (None, None)),
        *(down or (None, None)),
        dh_NH,
        dweight_TK,
        up_dz_NR,
        aa_NS,
        part_b,
        part_a,
        E,
        F,
        dout_TD.shape[1],
        K,
        R,
        S,
        *(up[1].stride() if up else (0, 0, 0)),
        *(down[1].stride() if down else (0, 0, 0)),
        gating.alpha,
        gating.limit if gating.limit is not None else 0.0,
        gating.up_offset,
        ACT=gating.act,
        CLIP=gating.limit is not None,
        GATED=gating.gated,
        INTERLEAVED=gating.gated and gating.interleaved,
        HAS_BIAS=bias_ED is not None,
        UP=up is not None,
        DOWN=down is not None,
        BINS=power_of_2(E),
        BM=tile.m,
        BC=tile.n,
        BR=max(16, power_of_2(R)),
        BS=max(16, power_of_2(S)),
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_D=64,
        PRECISION=dot_precision(h_NH.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
        # Two programs of 8 warps a multiprocessor; without it the compiler takes 140.
        maxnreg=128,
    )
    return AdaptedGatingGradient(
        dh_NH,
        dweight_TK,
        up_dz_NR,
        None if part_b is None else _sum_parts(part_b, routing, tile.m, h_NH.dtype),
        aa_NS,
        None if part_a is None else _sum_parts(part_a, routing, tile.m, h_NH.dtype, turned=True),
    )
