"""Attention of a few queries on a cache of latents, read once and as stored.

Letters: B batch, S queries a sequence, H heads, G groups of heads, R = H/G·S rows that share a group's keys,
L cached tokens, C latent width, P rotary width, X = G·P.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import dot_precision, processors
from .tuning import cdiv, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_kernel(
    q_latent_ptr, q_rot_ptr, latent_ptr, k_rot_ptr, mask_ptr, part_ptr, log_ptr,
    latent_b, latent_l, rot_b, rot_l, mask_b, mask_h, mask_s, mask_l,
    R, S, L, scale, cap,
    G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SPLITS: tl.constexpr,
    HAS_NOPE: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = (tl.program_id(2) // G).to(tl.int64)
    g = tl.program_id(2) % G
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    l = tl.arange(0, BLOCK_L)
    s = r % S
    row = (b * G + g) * R + r  # of queries (B, H, S), and of results

    q_rot = tl.load(q_rot_ptr + row[:, None] * P + p, mask=(r[:, None] < R) & (p < P), other=0.0)
    if HAS_NOPE:
        q_latent = tl.load(q_latent_ptr + row[:, None] * C + c, mask=(r[:, None] < R) & (c < C), other=0.0)

    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    tiles = tl.cdiv(L, BLOCK_L)
    first, last = tiles * split // SPLITS, tiles * (split + 1) // SPLITS
    where = b * mask_b + (g * (R // S) + r // S)[:, None] * mask_h + s[:, None] * mask_s
    if MASK == "boolean":
        # A static cache's unwritten end, and padding, cost their bytes of the mask and no more. Found out beforehand:
        # a branch in the loop below would keep its loads from running ahead.
        low, high = last, first
        for tile in range(first, last):
            at = tile * BLOCK_L + l
            seen = tl.load(mask_ptr + where + at * mask_l, mask=(r[:, None] < R) & (at < L), other=0)
            any_seen = tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0
            low = tl.where(any_seen, tl.minimum(low, tile), low)
            high = tl.where(any_seen, tile + 1, high)
        first, last = low, high
    for tile in range(first, last):
        at = tile * BLOCK_L + l
        seen = (r[:, None] < R) & (at < L)
        if CAUSAL:
            seen = seen & (at <= s[:, None])
        if MASK == "boolean":
            seen = seen & (tl.load(mask_ptr + where + at * mask_l, mask=seen, other=0) != 0)
        here = (b * latent_b + at.to(tl.int64) * latent_l)[:, None] + c
        latent = tl.load(latent_ptr + here, mask=(at[:, None] < L) & (c < C), other=0.0)
        here = (b * rot_b + at.to(tl.int64) * rot_l)[:, None] + g * P + p
        k_rot = tl.load(k_rot_ptr + here, mask=(at[:, None] < L) & (p < P), other=0.0)
        score = tl.dot(q_rot, k_rot.T, input_precision=PRECISION)
        if HAS_NOPE:
            score = tl.dot(q_latent, latent.T, score, input_precision=PRECISION)
        score *= scale
        if CAPPED:
            score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)
        score *= LOG2_E
        if MASK == "additive":
            score += tl.load(mask_ptr + where + at * mask_l, mask=seen, other=0.0).to(tl.float32) * LOG2_E
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf must not become NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        sums = tl.dot(weight.to(latent.dtype), latent, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top

    here = row * SPLITS + split
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(part_ptr + here[:, None] * C + c, sums / divisor[:, None], mask=(r[:, None] < R) & (c < C))
    tl.store(log_ptr + here, top + tl.log2(divisor), mask=r < R)


@triton.jit
def _join_kernel(
    part_ptr, log_ptr, sink_ptr, out_ptr, H, S,
    C: tl.constexpr, SPLITS: tl.constexpr, HAS_SINK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    log = tl.load(log_ptr + row * SPLITS + n, mask=n < SPLITS, other=float("-inf"))
    top = tl.max(log, 0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + (row // S) % H).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(log - base)
    total = tl.sum(weight, 0)
    if HAS_SINK:
        total += tl.exp2(sink - base)
    part = tl.load(part_ptr + (row * SPLITS + n)[:, None] * C + c, mask=(n[:, None] < SPLITS) & (c < C), other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=c < C)


@torch.library.custom_op("hf_moe::latent_decode", mutates_args=())
def _latent_decode(
    q_latent: Tensor | None, q_rot: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None, sinks: Tensor | None,
    scaling: float, softcap: float,
) -> Tensor:  # fmt: skip
    B, H, S, P = q_rot.shape
    _, _, L, C = latent.shape
    G = k_rot.shape[-1] // P
    R = H // G * S
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    k_rot = k_rot if k_rot.stride(-1) == 1 else k_rot.contiguous()
    block_r = min(max(power_of_2(R), 16), 64)
    block_c, block_p = max(power_of_2(C), 16), max(power_of_2(P), 16)
    wide = block_c * latent.element_size()
    block_l = 64 if wide <= 1024 else 32 if wide <= 2048 else 16
    row_blocks = cdiv(R, block_r)
    splits = _splits(cdiv(L, block_l), row_blocks * B * G, q_rot.device)

    part = torch.empty((B * H * S, splits, C), dtype=torch.float32, device=q_rot.device)
    log = torch.empty((B * H * S, splits), dtype=torch.float32, device=q_rot.device)
    kind, strides = "none", (0, 0, 0, 0)
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        mask = mask.expand(B, mask.shape[1], S, L)
        strides = (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0, mask.stride(2), mask.stride(3))
    _attend_kernel[(splits, row_blocks, B * G)](
        q_rot if q_latent is None else q_latent.contiguous(), q_rot.contiguous(), latent, k_rot,
        q_rot if mask is None else mask, part, log,
        latent.stride(0), latent.stride(2), k_rot.stride(0), k_rot.stride(2), *strides,
        R, S, L, scaling, softcap,
        G, C, P, splits,
        q_latent is not None, kind, mask is None and S > 1, softcap > 0, dot_precision(latent.dtype),
        block_r, block_l, block_c, block_p,
        num_warps=8 if block_r > 16 else 4, num_stages=2 if block_r <= 16 else 1,
    )  # fmt: skip
    out = torch.empty((B, H, S, C), dtype=q_rot.dtype, device=q_rot.device)
    block = min(block_c, 128)
    _join_kernel[(B * H * S, cdiv(C, block))](
        part, log, q_rot if sinks is None else sinks, out, H, S, C, splits, sinks is not None, block, power_of_2(splits)
    )
    return out


@_latent_decode.register_fake
def _latent_decode_fake(q_latent, q_rot, latent, k_rot, mask, sinks, scaling, softcap):
    return q_rot.new_empty((*q_rot.shape[:3], latent.shape[-1]))


def _splits(tiles: int, programs: int, device: torch.device) -> int:
    """Parts of the context, so that two waves of programs fill the GPU; a power of 2, for few compiled variants."""
    wanted = max(1, 2 * processors(device) // programs)
    return min(power_of_2(wanted + 1) // 2, power_of_2(tiles), 64)


def latent_decode(
    q_latent_BHSC: Tensor | None,
    q_rot_BHSP: Tensor,
    latent_B1LC: Tensor,
    k_rot_B1LX: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The absorbed form of latent attention, up to the values' projection.

        score[h, l] = (q_latent[h] · latent[l] + q_rot[h] · k_rot[l, g(h)]) · scaling        g(h) = ⌊h · G / H⌋
        out[h]      = Σ_l softmax(score[h])[l] · latent[l]

    Args:
        q_latent_BHSC: queries with W_uk folded in; None where keys are rotary alone.
        q_rot_BHSP: rotated queries.
        latent_B1LC, k_rot_B1LX: the cache as stored, in any strides that are dense in the last dimension.
        attention_mask: broadcastable to (B, H, S, L), boolean or additive. None: a single query sees all of L, and
            query i of several sees keys 0 to i. Tiles that a boolean mask hides from every row are not read, so a
            static cache costs what is written in it.
        softcap: scores become softcap · tanh(score / softcap). sinks_H: one more logit a head, in the divisor alone.
    Returns:
        (B, H, S, C) in q_rot's dtype, accumulated in fp32; exact zeros for a query that sees nothing.
    Gradients: none.
    Cost: reads B·L·(C + X) numbers once for G = 1 (the latents G times else, mostly from L2), with no host
        synchronisation; a grid from shapes alone, so that it can be captured. Deterministic.
    Source: absorption, arXiv:2405.04434; split over the context as in Flash-Decoding (crfm.stanford.edu/2023/10/12).
    """
    return _latent_decode(
        q_latent_BHSC, q_rot_BHSP, latent_B1LC, k_rot_B1LX, attention_mask, sinks_H, scaling, softcap or 0.0
    )
