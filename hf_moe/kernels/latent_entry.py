"""From projections to rotated queries and a cache entry: norm, rotation and the write, in one launch.

Letters: B batch, S queries a sequence, H heads, G key groups, C latent width, P rotary width, N position-free width
of a query head, L slots of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chain import chains, follow, overlap
from .tuning import cdiv, power_of_2


@triton.jit
def _rotate(source, target, i, keep, cos, sin, P: tl.constexpr, INTERLEAVE: tl.constexpr):
    """Rotate the pairs that start at `source`; the result's pairs are its two halves."""
    a = tl.load(source + (2 * i if INTERLEAVE else i), mask=keep, other=0.0)
    b = tl.load(source + (2 * i + 1 if INTERLEAVE else i + P // 2), mask=keep, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    tl.store(target + i, (wide_a * cos - wide_b * sin).to(a.dtype), mask=keep)
    tl.store(target + i + P // 2, (wide_b * cos + wide_a * sin).to(a.dtype), mask=keep)


@triton.jit(do_not_specialize=["L"], do_not_specialize_on_alignment=["S"])
def _enter_kernel(
    query_ptr, latent_key_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, rotated_ptr, latent_ptr, k_rot_ptr,
    cos_b, cos_s, latent_b, latent_l, k_rot_b, k_rot_l, S, L, eps,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SLOT: tl.constexpr, RING: tl.constexpr, ADVANCE: tl.constexpr, INTERLEAVE: tl.constexpr,
    CHAINED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    b, s = t // S, t % S
    i = tl.arange(0, HALF)
    follow(CHAINED)
    cos = tl.load(cos_ptr + b * cos_b + s * cos_s + i, mask=i < P // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * cos_b + s * cos_s + i, mask=i < P // 2, other=0.0).to(tl.float32)
    if tl.program_id(1) < tl.num_programs(1) - 1:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        query = query_ptr + (t * H + h[:, None]) * (N + P)
        rotated = rotated_ptr + ((b * H + h[:, None]) * S + s) * (N + P)
        if N > 0:
            n = tl.arange(0, BLOCK_N)
            keep = (h[:, None] < H) & (n < N)
            tl.store(rotated + n, tl.load(query + n, mask=keep), mask=keep)
        _rotate(query + N, rotated + N, i, (h[:, None] < H) & (i < P // 2), cos, sin, P, INTERLEAVE)
    else:
        slot = s
        if HAS_SLOT:
            begin = tl.load(slot_ptr)
            slot += begin
            if ADVANCE:
                tl.store(slot_ptr, begin + 1)
            if RING:
                slot %= L
        row = latent_key_ptr + t * (C + G * P)
        c = tl.arange(0, BLOCK_C)
        latent = tl.load(row + c, mask=c < C, other=0.0)
        if HAS_NORM:
            wide = latent.to(tl.float32)
            normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / C + eps)).to(latent.dtype)
            weight = tl.load(weight_ptr + c, mask=c < C, other=0.0)
            latent = (weight.to(tl.float32) * normed.to(tl.float32)).to(latent.dtype)
        # A full cache takes no more: the next slot would be another sequence's.
        width, groups = tl.where(slot < L, C, 0), tl.where(slot < L, G, 0)
        tl.store(latent_ptr + b * latent_b + slot * latent_l + c, latent, mask=c < width)
        g = tl.arange(0, BLOCK_G)
        k_rot = k_rot_ptr + b * k_rot_b + slot * k_rot_l + g[:, None] * P
        turned = (g[:, None] < groups) & (i < P // 2)
        _rotate(row + C + g[:, None] * P, k_rot, i, turned, cos, sin, P, INTERLEAVE)


def latent_entry(
    query_BSX: Tensor,
    latent_key_BSY: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    nope: int,
    latent_width: int,
    norm_C: Tensor | None,
    eps: float,
    interleave: bool,
    cache: tuple[Tensor, Tensor, Tensor] | None = None,
    ring: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, normalise, rotate and store what latent attention's two projections gave.

        query_h = [q_nope,h ; rope(q_rot,h)]      latent = norm(c)      k_g = rope(k_g)

    Args:
        query_BSX: (B, S, H·(N + P)), contiguous. latent_key_BSY: (B, S, C + G·P), contiguous, of the same dtype: fp32,
            bf16 or fp16.
        cos, sin: (B or 1, S, P), both halves alike.
        norm_C: weight of the latent's RMS norm, with `eps`; None for no norm.
        interleave: pairs stand side by side in both projections. Rotated ones stand half a width apart either way.
        cache: latents (B, 1, L, C), keys (B, 1, L, G·P) and a scalar int64: the slot of the first token. They are
            written in place, and the scalar moves on by S. Tokens from slot L on are lost.
        ring: they go on in slot 0 instead.
    Returns:
        queries (B, H, S, N + P), contiguous; then the two tensors of `cache`, or new ones with L = S.
    Gradients: none. Cost: everything is read and written once, one launch.
    Source: arXiv:2405.04434 section 2.1; rotation, arXiv:2104.09864.
    """
    B, S, _ = query_BSX.shape
    P = query_BSX.shape[-1] // heads - nope
    C, G = latent_width, (latent_key_BSY.shape[-1] - latent_width) // P
    query_BSX, latent_key_BSY = query_BSX.contiguous(), latent_key_BSY.contiguous()
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    rotated = query_BSX.new_empty((B, heads, S, nope + P))
    if cache is None:
        latent, k_rot, slot = query_BSX.new_empty((B, 1, S, C)), query_BSX.new_empty((B, 1, S, G * P)), None
    else:
        latent, k_rot, slot = cache
    if B * S == 0:
        return rotated, latent, k_rot
    # Only one program reads the slot of a single token, so it may write it too.
    alone = B * S == 1
    chained = chains(query_BSX.device)
    block_n = power_of_2(max(nope, 1))
    block_h = max(1, min(power_of_2(heads), 4096 // max(block_n, power_of_2(P))))
    _enter_kernel[(B * S, cdiv(heads, block_h) + 1)](
        query_BSX, latent_key_BSY, latent_key_BSY if norm_C is None else norm_C, cos, sin,
        cos if slot is None else slot, rotated, latent, k_rot,
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        latent.stride(0), latent.stride(2), k_rot.stride(0), k_rot.stride(2), S, latent.shape[2], eps,
        heads, G, C, P, nope, norm_C is not None, slot is not None, ring, alone, interleave,
        chained, block_h, power_of_2(G), power_of_2(C), block_n, power_of_2(P // 2), **overlap(chained),
    )  # fmt: skip
    if slot is not None and not alone:
        slot.add_(S)
    return rotated, latent, k_rot
