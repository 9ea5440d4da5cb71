"""The first projection of every expert: rows gathered from the tokens, the gate applied before anything is stored.

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, F expert width, H = 2F (gated) or F, E experts,
R rank of an adapter.
"""

import torch
import triton
import triton.language as tl
from triton.tools.ragged_tma import create_ragged_descriptor, to_ragged_indices

from . import grouped_hopper
from .descriptors import can_describe, dot_precision, programs, row_descriptor, weight_descriptor
from .gating import Gating, act_and_slope, gate_forward
from .launching import launched
from .routing import Routing
from .row_products import NO_ADAPTER, Adapter, dot_rows
from .tile_order import tile_of
from .tuning import Tile, cdiv


@launched
@triton.jit(do_not_specialize=["capacity"])
def _up_projection_kernel(
    x,
    w,
    z,
    b,
    bias_ptr,
    h_desc,
    a_desc,
    h_ptr,
    a_ptr,
    row_ptr,
    tile_ptr,
    capacity,
    N_IN,
    F,
    R,
    PER_TOKEN,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    alpha,
    limit,
    up_offset,
    ACT: tl.constexpr,
    CLIP: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
    IN_FIRST: tl.constexpr,
    ADAPTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    FAN: tl.constexpr = 2 if GATED else 1
    # Gate and up are two groups of output columns, or one group of pairs when interleaved.
    G: tl.constexpr = 1 if INTERLEAVED else FAN
    BF: tl.constexpr = BN // FAN
    group_out = F * FAN // G
    tiles = tl.load(tile_ptr + 3 * capacity)
    columns = tl.cdiv(F, BF)
    for work in tl.range(tl.program_id(0), tiles * columns, tl.num_programs(0), flatten=FLATTEN):
        tile, column = tile_of(work, tiles, columns, GROUP)
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
            column * (BN // G),
            N_IN,
            group_out,
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
            G,
            BM,
            BN,
            BK,
            EVEN_K,
            PRECISION,
        )
        if HAS_BIAS:
            out = tl.arange(0, BN)
            out_in_group = column * (BN // G) + out % (BN // G)
            bias_at = expert.to(tl.int64) * (F * FAN) + (out // (BN // G)) * group_out + out_in_group
            total += tl.load(bias_ptr + bias_at, mask=out_in_group < group_out, other=0.0).to(tl.float32)[None, :]
        # Rounded first: half the registers, and the backward's gate sees the same h.
        h = total.to(h_ptr.dtype.element_ty)
        rows = first + tl.arange(0, BM)
        rows64 = rows.to(tl.int64)[:, None]
        f = column * BF + tl.arange(0, BF)
        mask = (rows[:, None] < last) & (f[None, :] < F)
        c0, c1, c2 = to_ragged_indices(first, last - first, 0)
        if GATED:
            low, high = tl.split(h.reshape(BM, 2, BF).permute(0, 2, 1))
            gate, up = low, high
            if INTERLEAVED:
                gate, up = tl.split(h.reshape(BM, BF, 2))
            if STORE_H:
                if STORE_TMA:
                    near = column * (BN // G)
                    h_desc.store([c0, c1, c2, 0, near], low.reshape(1, 1, BM, 1, BF))
                    far = near + BF if INTERLEAVED else near
                    h_desc.store([c0, c1, c2, G - 1, far], high.reshape(1, 1, BM, 1, BF))
                elif INTERLEAVED:
                    pair = column * BN + tl.arange(0, BN)
                    h_ptrs = h_ptr + rows64 * (2 * F) + pair[None, :]
                    tl.store(h_ptrs, h, mask=(rows[:, None] < last) & (pair[None, :] < 2 * F))
                else:
                    h_ptrs = h_ptr + rows64 * (2 * F) + f[None, :]
                    tl.store(h_ptrs, gate, mask=mask)
                    tl.store(h_ptrs + F, up, mask=mask)
            if STORE_A:
                a = gate_forward(gate.to(tl.float32), up.to(tl.float32), alpha, limit, up_offset, ACT, CLIP).to(h.dtype)
                if STORE_TMA:
                    a_desc.store([c0, c1, c2, 0, column * BF], a.reshape(1, 1, BM, 1, BF))
                else:
                    tl.store(a_ptr + rows64 * F + f[None, :], a, mask=mask)
        else:
            if STORE_H:
                tl.store(h_ptr + rows64 * F + f[None, :], h, mask=mask)
            if STORE_A:
                a, _ = act_and_slope(h.to(tl.float32), alpha, ACT)
                tl.store(a_ptr + rows64 * F + f[None, :], a.to(h.dtype), mask=mask)


def up_projection(
    x: torch.Tensor,
    weight_EHD: torch.Tensor,
    routing: Routing,
    gating: Gating,
    tile: Tile,
    *,
    per_token: int | None = None,
    bias_EH: torch.Tensor | None = None,
    adapter: Adapter | None = None,
    store_h: bool,
    store_a: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The first projection and its gate, for every routed row.

        h[n] = weight[e] @ x[row] + b[e] @ z[n] + bias[e]        a[n] = gate(h[n])

    with row = n, or routing.row[n] // per_token when that is given.

    Args:
        x: (N, D) rows sorted by expert or, with per_token, (T, D) tokens; fp32, bf16 or fp16, contiguous in D.
        weight_EHD: x's dtype, any strides.
        gating: see `Gating`; it also names the order of weight's rows.
        adapter: z and b, for a term of low rank in the same sum.
        store_h, store_a: which of the two to write.
    Returns:
        (h_NH or None, a_NF or None). The gate reads h as it is stored, rounded to x's dtype. Rows of no expert stay
        unwritten.
    Cost: 2·N·H·(D + R) FLOPs; not storing h saves 2·N·H bytes.
    """
    _, n_h, n_in = weight_EHD.shape
    F, N = n_h // gating.fan, routing.row_N.numel()
    groups = 2 if gating.gated and not gating.interleaved else 1
    h_NH = x.new_empty((N, n_h)) if store_h else None
    a_NF = x.new_empty((N, F)) if store_a else None
    in_first = weight_EHD.stride(2) != 1
    # Copied rows without h have not been measured there.
    measured = store_a and (store_h or per_token is not None)
    if measured and grouped_hopper.suits(x, weight_EHD, tile, gating=gating, bias=bias_EH, adapter=adapter):
        grouped_hopper.product(x, weight_EHD, routing, tile, h_NH, a_NF, per_token=per_token, gating=gating)
        return h_NH, a_NF
    adapter = adapter and adapter.beside(in_first)
    described = adapter is None or adapter.described(in_first)
    x_tma = per_token is None and can_describe(x) and described
    stored = weight_EHD.transpose(1, 2) if in_first else weight_EHD
    # A group of columns starts at a multiple of F, which must be 16-byte aligned too.
    w_tma = can_describe(stored) and described and (groups == 1 or not in_first or F * x.element_size() % 16 == 0)
    h_desc = a_desc = None
    store_tma = tile.tma_store and gating.gated and F * x.element_size() % 16 == 0 and can_describe(stored)
    if store_tma and h_NH is not None:
        h_desc = create_ragged_descriptor(h_NH.view(N, groups, n_h // groups), [tile.m, 1, tile.n // 2])
    if store_tma and a_NF is not None:
        a_desc = create_ragged_descriptor(a_NF.view(N, 1, F), [tile.m, 1, tile.n // 2])
    work = routing.max_tiles * cdiv(n_h, tile.n)
    z, b, R, *b_strides = adapter.arguments(groups, tile, x_tma, w_tma) if adapter else NO_ADAPTER
    _up_projection_kernel[(programs(tile, work, x.device),)](
        row_descriptor(x, tile.m, tile.k) if x_tma else x,
        weight_descriptor(weight_EHD, groups, tile.n, tile.k) if w_tma else weight_EHD,
        z,
        b,
        bias_EH,
        h_desc,
        a_desc,
        h_NH if store_h else a_NF,
        a_NF,
        routing.row_N,
        routing.tile,
        routing.capacity,
        n_in,
        F,
        R,
        per_token or 1,
        x.stride(0),
        *weight_EHD.stride(),
        *b_strides,
        gating.alpha,
        gating.limit if gating.limit is not None else 0.0,
        gating.up_offset,
        ACT=gating.act,
        CLIP=gating.limit is not None,
        GATED=gating.gated,
        INTERLEAVED=gating.gated and gating.interleaved,
        HAS_BIAS=bias_EH is not None,
        STORE_H=store_h,
        STORE_A=store_a,
        GATHER=per_token is not None,
        X_TMA=x_tma,
        W_TMA=w_tma,
        STORE_TMA=store_tma,
        IN_FIRST=in_first,
        ADAPTED=adapter is not None,
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
    return h_NH, a_NF
