"""Products of single rows with matrices of their own, by fused multiply-adds: what one token needs of its experts.

    y[r] = gate(Σ_c weight[n] · (W[e] @ x[n // per_token] + bias[e]))      n = r·C + c,  e = index[n]

Letters: R rows of output, C choices summed in each, N = R·C, E experts, I input columns, O columns of y, H = 2·O with a
gate or O.
"""

import torch
import triton
import triton.language as tl

from .chain import chains, follow, overlap, prefetch
from .gating import Gating, act_and_slope, gate_forward
from .tuning import Tile, cdiv, power_of_2


@triton.jit
def weight_rows(row, block, O, gap, stride_o, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """Of the weight rows behind a block of outputs, gate's before up's or in pairs: offset, number, and which exist."""
    if INTERLEAVED:
        number = block * (2 * BLOCK) + row
        return number.to(tl.int64) * stride_o, number, number < 2 * O
    else:
        group, out = row // BLOCK, block * BLOCK + row % BLOCK
        return group * gap + out.to(tl.int64) * stride_o, group * O + out, out < O


@triton.jit
def gated(
    h, alpha, limit, up_offset,
    ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK) of a in fp32 from h, whose columns are in the order of `weight_rows`."""
    if GATED:
        if INTERLEAVED:
            gate, up = tl.split(h.reshape(ROWS, BLOCK, 2))
        else:
            gate, up = tl.split(h.reshape(ROWS, 2, BLOCK).permute(0, 2, 1))
        return gate_forward(gate, up, alpha, limit, up_offset, ACT, CLIP)
    elif ACT == "none":
        return h
    else:
        a, _ = act_and_slope(h, alpha, ACT)
        return a


@triton.jit
def _stream(lines, k, I, real):
    return tl.load(lines + k[None, :], mask=real[:, None] & (k < I)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _single_rows_kernel(
    x_ptr, w_ptr, bias_ptr, weight_ptr, added_ptr, y_ptr, index_ptr,
    E, I, O, C, PER_TOKEN, gap, x_stride, w_stride_e, w_stride_o, alpha, limit, up_offset,
    ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    HAS_ADDED: tl.constexpr, CHAINED: tl.constexpr,
    AHEAD: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    FAN: tl.constexpr = 2 if GATED else 1
    BN: tl.constexpr = FAN * BLOCK
    block, row = tl.program_id(0), tl.program_id(1)
    if HAS_INDEX:
        follow(CHAINED)
    line = tl.arange(0, CHOICES * BN)
    offset, number, exists = weight_rows(line % BN, block, O, gap, w_stride_o, GATED, INTERLEAVED, BLOCK)
    h = tl.zeros((BN,), tl.float32)
    for first in range(0, C, CHOICES):
        choice = first + line // BN
        n = row * C + choice
        owned = choice < C
        expert = tl.zeros_like(n).to(tl.int64)
        if HAS_INDEX:
            expert = tl.load(index_ptr + n, mask=owned, other=-1).to(tl.int64)
            owned = owned & (expert >= 0) & (expert < E)
        real = owned & exists
        w_lines = w_ptr + (expert * w_stride_e + offset)[:, None]
        x_lines = x_ptr + ((n // PER_TOKEN).to(tl.int64) * x_stride)[:, None]
        # Eight partial sums a line and thread at a time: no shuffles before the end.
        part = tl.zeros((CHOICES * BN, BK // 8), tl.float32)
        if CHAINED and not HAS_INDEX:
            # The first weights are on their way from memory while the launch before this one ends.
            LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
            ahead = tl.arange(0, BK // LINE) * LINE
            prefetch(w_lines + ahead[None, :], real[:, None] & (ahead < I)[None, :], w_ptr)
            follow(CHAINED)
        if AHEAD:
            w = _stream(w_lines, tl.arange(0, BK), I, real)
        for start in range(0, I, BK):
            k = start + tl.arange(0, BK)
            if AHEAD:
                w_next = _stream(w_lines, k + BK, I, real)
            else:
                w = _stream(w_lines, k, I, real)
            x = tl.load(x_lines + k[None, :], mask=real[:, None] & (k < I)[None, :], other=0.0)
            part += tl.sum((w.to(tl.float32) * x.to(tl.float32)).reshape(CHOICES * BN, BK // 8, 8), 2)
            if AHEAD:
                w = w_next
        total = tl.sum(part, 1)
        if HAS_BIAS:
            total += tl.load(bias_ptr + expert * (FAN * O) + number, mask=real, other=0.0).to(tl.float32)
        if WEIGHTED:
            total *= tl.load(weight_ptr + n, mask=owned, other=0.0).to(tl.float32)
        h += tl.sum(total.reshape(CHOICES, BN), 0)
    y = gated(h[None, :], alpha, limit, up_offset, ACT, CLIP, GATED, INTERLEAVED, 1, BLOCK)
    out = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    if HAS_ADDED:
        y += tl.load(added_ptr + row.to(tl.int64) * O + out, mask=out < O, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * O + out, y.to(y_ptr.dtype.element_ty), mask=out < O)


def gate_arguments(gating: Gating | None) -> tuple:
    """alpha, limit, up_offset, ACT, CLIP, GATED, INTERLEAVED of a kernel's gate; None lets a product through."""
    if gating is None:
        return 1.0, 0.0, 0.0, "none", False, False, False
    act, alpha, limit, up_offset, is_gated, interleaved = gating
    return alpha, limit or 0.0, up_offset, act, limit is not None, is_gated, is_gated and interleaved


def single_rows(
    x: torch.Tensor,
    weight_EHI: torch.Tensor,
    index: torch.Tensor | None,
    tile: Tile,
    *,
    columns: int,
    gap: int = 0,
    gating: Gating | None = None,
    bias_EH: torch.Tensor | None = None,
    weight_TK: torch.Tensor | None = None,
    per_token: int = 1,
    added_RO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Products of single rows, each with its own matrix, gated or weighted and summed.

        y[r] = gate(Σ_c weight[n] · (W[e] @ x[n // per_token] + bias[e])) + added[r]      n = r·C + c,  e = index[n]

    Args:
        x: fp32, bf16 or fp16, contiguous in its last dimension.
        weight_EHI: x's dtype, contiguous in I.
        index: expert of each n, contiguous int32 or int64; one outside 0 .. E-1 adds nothing. None: E is 1.
        tile: n rows of the weights a program, k of I at a time, the next k ahead of their use with two stages.
        columns, gap: O, and how many elements after a gate's row its up row lies (ignored if interleaved).
        weight_TK: sums the K rows of each token by these weights, any float dtype; None sums nothing, C = 1.
        added_RO: contiguous.
    Returns:
        y_RO in x's dtype, accumulated in fp32.
    Cost: reads the weights of every n once; one launch, deterministic.
    """
    E, _, n_in = weight_EHI.shape
    N = x.shape[0] if index is None else index.numel()
    C = 1 if weight_TK is None else weight_TK.shape[1]
    y_RO = x.new_empty((N // C, columns))
    chained = chains(x.device)
    choices = min(power_of_2(C), 8)
    fan = 1 if gating is None else gating.fan
    block = max(tile.n // (choices * fan), 1)
    _single_rows_kernel[(cdiv(columns, block), N // C)](
        x, weight_EHI, bias_EH, weight_TK, added_RO, y_RO, index,
        E, n_in, columns, C, per_token, gap, x.stride(0), weight_EHI.stride(0), weight_EHI.stride(1),
        *gate_arguments(gating),
        index is not None, bias_EH is not None, weight_TK is not None,
        added_RO is not None, chained,
        tile.stages > 1, choices, block, tile.k,
        num_warps=tile.warps, **overlap(chained),
    )  # fmt: skip
    return y_RO
