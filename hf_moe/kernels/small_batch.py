"""Prototype."""

import torch
import triton
import triton.language as tl

from .descriptors import dot_precision
from .gating import act_and_slope, gate_forward
from .routing import load_expert
from .tuning import cdiv, power_of_2


@triton.jit
def _gated(h, alpha, limit, up_offset, ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, M: tl.constexpr, BF: tl.constexpr):
    if GATED:
        if INTERLEAVED:
            gate, up = tl.split(h.reshape(M, BF, 2))
        else:
            gate, up = tl.split(h.reshape(M, 2, BF).permute(0, 2, 1))
        return gate_forward(gate, up, alpha, limit, up_offset, ACT, CLIP)
    else:
        if ACT == "none":
            return h
        else:
            a, _ = act_and_slope(h, alpha, ACT)
            return a


@triton.jit
def _columns(block, F, gap, stride_o, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BF: tl.constexpr):
    """Offsets of a block's weight rows, their places in a bias, and which exist."""
    FAN: tl.constexpr = 2 if GATED else 1
    r = tl.arange(0, FAN * BF)
    if INTERLEAVED:
        out = block * (FAN * BF) + r
        return out.to(tl.int64) * stride_o, out, out < FAN * F
    else:
        f = block * BF + r % BF
        group = r // BF
        return group * gap + f.to(tl.int64) * stride_o, group * F + f, f < F


@triton.jit
def _rows_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, index_ptr, N, E, K, N_IN, F, gap, x_stride,
    w_stride_e, w_stride_o, w_stride_i, alpha, limit, up_offset,
    ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BY_EXPERT: tl.constexpr, WAITS: tl.constexpr, PDL: tl.constexpr, SWAP: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    FAN: tl.constexpr = 2 if GATED else 1
    BN: tl.constexpr = BF * FAN
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, slot = tl.program_id(0), tl.program_id(1)
    t, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    n = t[:, None] * K + k[None, :]
    owner = tl.load(index_ptr + n, mask=(n < N) & (k < K)[None, :], other=-1).to(tl.int32)
    expert = slot
    if not BY_EXPERT:
        expert = load_expert(index_ptr, slot, N, E)
    mine = owner == expert
    route = tl.min(tl.where(mine, n, N), 1)
    hit = (route < N).to(tl.int32)
    count = tl.sum(hit, 0)
    if not BY_EXPERT:
        count = tl.where((tl.min(route, 0) < slot) | (expert >= E), 0, count)
    if count == 0:
        return
    rank = tl.where(hit > 0, tl.cumsum(hit, 0) - 1, -1)
    offset, bias_at, exists = _columns(block, F, gap, w_stride_o, GATED, INTERLEAVED, BF)
    w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + offset
    if WAITS:
        tl.extra.cuda.gdc_wait()
    for first in range(0, count, BM):
        r = first + tl.arange(0, BM)
        row = tl.sum(tl.where(rank[None, :] == r[:, None], route[None, :], 0), 1)
        token = row // K
        if PER_TOKEN:
            row = token
        x_rows = x_ptr + row.to(tl.int64) * x_stride
        if SWAP:
            total = tl.zeros((BN, BM), tl.float32)
        else:
            total = tl.zeros((BM, BN), tl.float32)
        for begin in range(0, N_IN, BK):
            at = begin + tl.arange(0, BK)
            at64 = at.to(tl.int64)
            if SWAP:
                if EVEN:
                    x = tl.load(x_rows[:, None] + at[None, :])
                    w = tl.load(w_rows[:, None] + at64[None, :] * w_stride_i, eviction_policy="evict_first")
                else:
                    x = tl.load(x_rows[:, None] + at[None, :], mask=at[None, :] < N_IN, other=0.0)
                    w = tl.load(w_rows[:, None] + at64[None, :] * w_stride_i, mask=exists[:, None] & (at[None, :] < N_IN), other=0.0, eviction_policy="evict_first")
                total = tl.dot(w, x.T, total, input_precision=PRECISION)
            else:
                if EVEN:
                    x = tl.load(x_rows[:, None] + at[None, :])
                    w = tl.load(w_rows[None, :] + at64[:, None] * w_stride_i, eviction_policy="evict_first")
                else:
                    x = tl.load(x_rows[:, None] + at[None, :], mask=at[None, :] < N_IN, other=0.0)
                    w = tl.load(w_rows[None, :] + at64[:, None] * w_stride_i, mask=exists[None, :] & (at[:, None] < N_IN), other=0.0, eviction_policy="evict_first")
                total = tl.dot(x, w, total, input_precision=PRECISION)
        h = total
        if SWAP:
            h = total.T
        if HAS_BIAS:
            h += tl.load(bias_ptr + expert.to(tl.int64) * (F * FAN) + bias_at, mask=exists, other=0.0).to(tl.float32)[None, :]
        a = _gated(h, alpha, limit, up_offset, ACT, CLIP, GATED, INTERLEAVED, BM, BF)
        f = block * BF + tl.arange(0, BF)
        for choice in range(0, K):
            to = token * K + choice
            chosen = tl.load(index_ptr + to, mask=r < count, other=-1).to(tl.int32) == expert
            y_ptrs = y_ptr + to.to(tl.int64)[:, None] * F + f[None, :]
            tl.store(y_ptrs, a.to(y_ptr.dtype.element_ty), mask=chosen[:, None] & (f[None, :] < F))


@triton.jit
def _sum_kernel(y_ptr, weight_ptr, index_ptr, out_ptr, N, E, D, K: tl.constexpr, WAITS: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.program_id(1)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(K):
        n = token * K + k
        width = tl.where(load_expert(index_ptr, n, N, E) < E, D, 0)
        y = tl.load(y_ptr + n.to(tl.int64) * D + d, mask=d < width, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n).to(tl.float32)
        total += tl.where(d < width, y * weight, 0.0)
    tl.store(out_ptr + token.to(tl.int64) * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _stream(rows, at, width, exists, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(rows + at[None, :], eviction_policy="evict_first")
    else:
        return tl.load(rows + at[None, :], mask=(at < width)[None, :] & exists[:, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def _route_up_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, index_ptr, N, E, PER_TOKEN, F, gap, x_stride,
    w_stride_e, w_stride_o, alpha, limit, up_offset, D: tl.constexpr,
    ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    BF: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    FAN: tl.constexpr = 2 if GATED else 1
    R: tl.constexpr = FAN * BF
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, n = tl.program_id(0), tl.program_id(1)
    expert = load_expert(index_ptr, n, N, E)
    if expert >= E:
        return
    offset, bias_at, exists = _columns(block, F, gap, w_stride_o, GATED, INTERLEAVED, BF)
    w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + offset[:, None]
    x_row = x_ptr + (n // PER_TOKEN).to(tl.int64) * x_stride
    part = tl.zeros((R, BK // 8), tl.float32)
    at = tl.arange(0, BK)
    if AHEAD:
        w = _stream(w_rows, at, D, exists, EVEN)
    for begin in tl.range(0, D, BK, loop_unroll_factor=UNROLL, num_stages=STAGES):
        at = begin + tl.arange(0, BK)
        if AHEAD:
            w_next = _stream(w_rows, at + BK, D, exists, False)
        else:
            w = _stream(w_rows, at, D, exists, EVEN)
        if EVEN:
            x = tl.load(x_row + at[None, :] + tl.zeros((R, 1), tl.int32))
        else:
            x = tl.load(x_row + at[None, :] + tl.zeros((R, 1), tl.int32), mask=(at < D)[None, :] & exists[:, None], other=0.0)
        part += tl.sum((w.to(tl.float32) * x.to(tl.float32)).reshape(R, BK // 8, 8), 2)
        if AHEAD:
            w = w_next
    h = tl.sum(part, 1)
    if HAS_BIAS:
        h += tl.load(bias_ptr + expert.to(tl.int64) * (F * FAN) + bias_at, mask=exists, other=0.0).to(tl.float32)
    a = _gated(h[None, :], alpha, limit, up_offset, ACT, CLIP, GATED, INTERLEAVED, 1, BF)
    f = block * BF + tl.arange(0, BF)
    tl.store(a_ptr + n.to(tl.int64) * F + f[None, :], a.to(a_ptr.dtype.element_ty), mask=(f < F)[None, :])


@triton.jit
def _route_down_kernel(
    a_ptr, w_ptr, bias_ptr, weight_ptr, out_ptr, index_ptr, N, E, D, w_stride_e, w_stride_o, F: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
    KB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    block, token = tl.program_id(0), tl.program_id(1)
    R: tl.constexpr = KB * BD
    r = tl.arange(0, R)
    d = block * BD + r % BD
    total = tl.zeros((KB, BD), tl.float32)
    for first in tl.static_range(0, K, KB):
        choice = first + r // BD
        n = token * K + choice
        expert = tl.load(index_ptr + n, mask=choice < K, other=E)
        owned = (expert >= 0) & (expert < E)
        exists = owned & (d < D)
        w_rows = w_ptr + (expert.to(tl.int64) * w_stride_e + d.to(tl.int64) * w_stride_o)[:, None]
        a_rows = a_ptr + (n.to(tl.int64) * F)[:, None]
        part = tl.zeros((R, BK // 8), tl.float32)
        if AHEAD:
            w = _stream(w_rows, tl.arange(0, BK), F, exists, False)
        if PDL:
            tl.extra.cuda.gdc_wait()
        for begin in tl.range(0, F, BK, loop_unroll_factor=UNROLL, num_stages=STAGES):
            at = begin + tl.arange(0, BK)
            mask = exists[:, None]
            if not EVEN:
                mask = mask & (at < F)[None, :]
            if AHEAD:
                w_next = _stream(w_rows, at + BK, F, exists, False)
            else:
                w = tl.load(w_rows + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            a = tl.load(a_rows + at[None, :], mask=mask, other=0.0)
            part += tl.sum((w.to(tl.float32) * a.to(tl.float32)).reshape(R, BK // 8, 8), 2)
            if AHEAD:
                w = w_next
        y = tl.sum(part, 1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + expert.to(tl.int64) * D + d, mask=exists, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + n, mask=owned, other=0.0).to(tl.float32)
        total += (y * weight).reshape(KB, BD)
    out = block * BD + tl.arange(0, BD)
    tl.store(out_ptr + token.to(tl.int64) * D + out, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=out < D)


def rows(x, w, bias, index, gating, per_token, gap, F, *, BM, BF, BK, warps, stages, swap=False, waits=False, pdl=False):
    """gating None: no gate."""
    (T, K), N, E, n_in = index.shape, index.numel(), w.shape[0], w.shape[2]
    fan = 1 if gating is None else gating.fan
    y = x.new_empty((N, F))
    by_expert = N >= E
    even = n_in % BK == 0 and F % BF == 0
    _rows_kernel[(cdiv(F, BF), E if by_expert else N)](
        x, w, bias, y, index, N, E, K, n_in, F, gap, x.stride(0), *w.stride(),
        1.0 if gating is None else gating.alpha, 0.0 if gating is None or gating.limit is None else gating.limit, 0.0 if gating is None else gating.up_offset,
        "none" if gating is None else gating.act, gating is not None and gating.limit is not None,
        fan == 2, fan == 2 and gating.interleaved, bias is not None,
        by_expert, waits, pdl, swap, per_token, max(power_of_2(T), 16), power_of_2(K), BM, BF, BK, even, dot_precision(x.dtype),
        num_warps=warps, num_stages=stages, **({"launch_pdl": True} if waits else {}),
    )  # fmt: skip
    return y


def total(y, weight, index, E, waits=False, block=512):
    T, K = index.shape
    D = y.shape[1]
    out = y.new_empty((T, D))
    block = min(power_of_2(D), block)
    _sum_kernel[(cdiv(D, block), T)](y, weight, index, out, T * K, E, D, K, waits, block, num_warps=max(1, block // 256), **({"launch_pdl": True} if waits else {}))
    return out


def route_up(x, w, bias, index, gating, gap, F, *, BF, BK, warps, unroll=1, stages=1, ahead=False, pdl=False):
    N, K, E, D = index.numel(), index.shape[1], w.shape[0], w.shape[2]
    a = x.new_empty((N, F))
    _route_up_kernel[(cdiv(F, BF), N)](
        x, w, bias, a, index, N, E, K, F, gap, x.stride(0), w.stride(0), w.stride(1),
        gating.alpha, gating.limit or 0.0, gating.up_offset, D,
        gating.act, gating.limit is not None, gating.gated, gating.gated and gating.interleaved, bias is not None,
        pdl, ahead, unroll, stages, BF, BK, D % BK == 0 and F % BF == 0, num_warps=warps,
    )  # fmt: skip
    return a


def route_down(a, w, bias, weight, index, *, BD, BK, warps, KB=None, ahead=False, unroll=1, stages=1, pdl=False):
    (T, K), (E, D, F) = index.shape, w.shape
    out = a.new_empty((T, D))
    KB = KB or min(power_of_2(K), 8)
    _route_down_kernel[(cdiv(D, BD), T)](
        a, w, bias, weight, out, index, T * K, E, D, w.stride(0), w.stride(1), F, K,
        bias is not None, pdl, ahead, unroll, stages, KB, BD, BK, F % BK == 0, num_warps=warps,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out
