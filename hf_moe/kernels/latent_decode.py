"""Attention of a few queries on a cache of latents, read once and as stored.

Letters: B sequences, S queries a sequence, H heads, G groups of heads, R = H/G·S rows that share a group's keys,
L cached tokens, C latent width, P rotary width, X = G·P, T packed queries, N splits of the context.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import latent_hopper
from .chain import chains, follow, overlap
from .descriptors import dense_rows, dot_precision, has_copy_engine, processors
from .latent_join import join, values
from .tuning import cdiv, nvidia_generation, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["latent_b", "rot_b", "L", "N"], do_not_specialize_on_alignment=["S", "head_rows"])
def _attend_kernel(
    q_latent_ptr, q_rot_ptr, latent_ptr, k_rot_ptr, slot_ptr, mask_ptr, start_ptr, end_ptr, query_ptr, out_ptr, log_ptr,
    latent_b, rot_b, jump, end_b, mask_b, mask_h, mask_s, mask_l,
    S, L, HEADS, head_rows, rot_row, N, scale, cap, window,
    G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, LATENT_L: tl.constexpr, ROT_L: tl.constexpr, HALF: tl.constexpr,
    MASK: tl.constexpr, BY_ROW: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, SCAN: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    follow(CHAINED)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    b = (tl.program_id(2) // G).to(tl.int64)
    g = tl.program_id(2) % G
    c = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    l = tl.arange(0, BLOCK_L)

    if query_ptr is None:
        first_row = b * G * HEADS * S
    else:
        first_row = tl.load(query_ptr + b).to(tl.int64)
        S = tl.load(query_ptr + b + 1) - first_row.to(tl.int32)
    R = HEADS * S
    s = r % tl.maximum(S, 1)
    h = g * HEADS + r // tl.maximum(S, 1)
    row = first_row + h.to(tl.int64) * head_rows + s  # of queries and of results
    is_row = r < R
    q_rot = tl.load(q_rot_ptr + row[:, None] * rot_row + p, mask=is_row[:, None] & (p < P), other=0.0)
    if q_latent_ptr is not None:
        q_latent = tl.load(q_latent_ptr + row[:, None] * C + c, mask=is_row[:, None] & (c < C), other=0.0)

    # What the rows see: slots from `low` to `high`, each row up to `until` and, in a window, from `until - window` on.
    low, high, nothing = 0, L, 0.0
    if start_ptr is not None:
        low = tl.load(start_ptr + b).to(tl.int32)
    if end_ptr is not None:
        high = tl.load(end_ptr + b * end_b).to(tl.int32)
        if query_ptr is None:
            # A cache that took more tokens than it has slots: nobody may read on, or believe the result.
            nothing = tl.where(high > L, float("nan"), 0.0)
            high = tl.minimum(high, L)
    until = tl.where(is_row, high, 0)
    if CAUSAL:
        until = tl.where(is_row, high - S + s + 1, 0)
    if WINDOW:
        low = tl.maximum(low, high - S + 1 - window)
    tiles = tl.cdiv(tl.maximum(high - low, 0), BLOCK_L)
    high = tl.minimum(high, low + tiles * (split + 1) // N * BLOCK_L)
    low += tiles * split // N * BLOCK_L
    where = b * mask_b
    if BY_ROW:
        where += h[:, None] * mask_h + s[:, None] * mask_s
    if MASK == "boolean":
        # Padding and unwritten slots cost their bytes of the mask and no more. Found out beforehand: a branch in the
        # loop below would keep its loads from running ahead.
        least, most = high, low
        for begin in range(low, high, SCAN):
            at = begin + tl.arange(0, SCAN)[None, :]
            seen = at < high
            if BY_ROW:
                seen = seen & is_row[:, None]
            seen = tl.load(mask_ptr + where + at * mask_l, mask=seen, other=0) != 0
            least = tl.minimum(least, tl.min(tl.min(tl.where(seen, at, high), 1), 0))
            most = tl.maximum(most, tl.max(tl.max(tl.where(seen, at + 1, low), 1), 0))
        low, high = least, most

    if HALF:
        # Each token's C + X numbers lie in two places.
        latent_c = c + tl.where(c >= HALF, jump, 0)
        rot_p = C + g * P + p
        rot_p += tl.where(rot_p >= HALF, jump, 0)
        if HALF % 8 == 0 and C % 8 == 0 and P % 8 == 0:
            latent_c = tl.max_contiguous(tl.multiple_of(latent_c, 8), 8)
            rot_p = tl.max_contiguous(tl.multiple_of(rot_p, 8), 8)
    else:
        latent_c = c
        rot_p = g * P + p
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    sums = tl.full((BLOCK_R, BLOCK_C), nothing, tl.float32)
    for begin in range(low, high, BLOCK_L):
        at = begin + l
        written = at < high
        seen = at < tl.minimum(until, high)[:, None]
        if WINDOW:
            seen = seen & (at >= (until - window)[:, None])
        if MASK == "boolean":
            seen = seen & (tl.load(mask_ptr + where + at[None, :] * mask_l, mask=written[None, :], other=0) != 0)
        slot = at.to(tl.int64)
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + at, mask=written, other=0).to(tl.int64)
        here = ((b * latent_b + slot) * LATENT_L)[:, None] + latent_c
        latent = tl.load(latent_ptr + here, mask=written[:, None] & (c < C), other=0.0)
        here = ((b * rot_b + slot) * ROT_L)[:, None] + rot_p
        k_rot = tl.load(k_rot_ptr + here, mask=written[:, None] & (p < P), other=0.0)
        score = tl.dot(q_rot, k_rot.T, input_precision=PRECISION)
        if q_latent_ptr is not None:
            score = tl.dot(q_latent, latent.T, score, input_precision=PRECISION)
        if CAPPED:
            score = cap * (2.0 * tl.sigmoid(2.0 * scale / cap * score) - 1.0) * LOG2_E
        else:
            score *= scale * LOG2_E
        if MASK == "additive":
            added = tl.load(mask_ptr + where + at[None, :] * mask_l, mask=written[None, :], other=0.0)
            score += added.to(tl.float32) * LOG2_E
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf must not become NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, 1)
        sums = tl.dot(weight.to(latent.dtype), latent, sums * shrink[:, None], input_precision=PRECISION)
        top = new_top

    divisor = tl.where(total > 0, total, 1.0)
    sums = sums / divisor[:, None]
    here = row
    if not DIRECT:
        here = row * N + split
        tl.store(log_ptr + here, top + tl.log2(divisor), mask=is_row)
    tl.store(out_ptr + here[:, None] * C + c, sums.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (c < C))


# Below this many tokens a call takes as long as its programs take to start, and small ones start faster.
_FEW_TOKENS = 8192


class Tile(NamedTuple):
    """Query rows and cached tokens of a block, warps a program, blocks in flight."""

    rows: int
    tokens: int
    warps: int
    stages: int


def choose(R: int, bytes_wide: int, tokens: int, device: torch.device) -> Tile:
    """The tile for R rows that share keys, a latent of so many bytes, and so many tokens in all sequences."""
    # 221 KiB of shared memory, as Hopper and Blackwell have it in data centres, and the interpreter.
    if R > 16 and bytes_wide <= 1024 and has_copy_engine(device) and nvidia_generation(device) in (0, 9, 10):
        return Tile(64, 64, 8, 2)
    fit = max(16, 65536 // bytes_wide)
    if tokens < _FEW_TOKENS:
        return Tile(16, min(16 if tokens <= 2048 else 32, fit), 4, 2)
    return Tile(16, 128, 8, 2) if bytes_wide < 512 else Tile(16, min(64, fit), 4, 2)


@torch.library.custom_op("hf_moe::latent_decode", mutates_args=())
def _latent_decode(
    q_latent: Tensor | None, q_rot: Tensor, latent: Tensor, k_rot: Tensor, slots: Tensor | None, mask: Tensor | None,
    start: Tensor | None, end: Tensor | None, query_start: Tensor | None, sinks: Tensor | None,
    value: Tensor | None, C: int, G: int, longest_query: int, longest_key: int, causal: bool, scaling: float,
    softcap: float, window: int,
) -> Tensor:  # fmt: skip
    B, H, S, P = q_rot.shape
    sequences = B if query_start is None else query_start.shape[0] - 1
    half = latent.shape[-1] if slots is not None else 0
    jump = (k_rot.data_ptr() - latent.data_ptr()) // latent.element_size() - half if half else 0
    device, dtype = q_rot.device, latent.dtype
    # A part of a wider query is read where it lies.
    q_rot_rows = dense_rows(q_rot.flatten(0, 2))
    q_latent = None if q_latent is None else q_latent.contiguous()
    R = H // G * longest_query
    block_c, block_p = max(power_of_2(C), 16), max(power_of_2(P), 16)
    tokens = longest_key * sequences * G
    on_hopper = slots is None and query_start is None and (R > 16 or tokens >= _FEW_TOKENS)
    on_hopper = on_hopper and latent_hopper.suits(q_latent, q_rot_rows, latent, k_rot, mask)
    tile = Tile(64, 64, 12, 2) if on_hopper else choose(R, block_c * latent.element_size(), tokens, device)
    if slots is not None:
        tile = tile._replace(warps=8)  # addresses take registers
    row_blocks = cdiv(R, tile.rows)
    room = (1 if on_hopper else 2) * processors(device)
    N = _splits(cdiv(longest_key, tile.tokens), row_blocks * sequences * G, room)
    direct = N == 1 and sinks is None

    out = torch.empty((B, H, S, C), dtype=q_rot.dtype, device=device)
    part, log = out, out
    if not direct:
        part = torch.empty((B * H * S, N, C), dtype=torch.float32, device=device)
        log = torch.empty((B * H * S, N), dtype=torch.float32, device=device)
    if on_hopper:
        assert q_latent is not None
        latent_hopper.attend(
            q_latent, q_rot_rows, latent, k_rot, mask, start, end, part, log,
            G, longest_key, N, causal, scaling, softcap, window,
        )  # fmt: skip
        return _finish(part, log, sinks, value, out)
    kind, by_row, strides = "none", False, [0] * 4
    if mask is not None:
        kind = "boolean" if mask.dtype == torch.bool else "additive"
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
        by_row = mask.shape[1] > 1 or mask.shape[2] > 1
    chained = chains(device)
    _attend_kernel[(row_blocks, N, sequences * G)](
        q_latent, q_rot_rows, latent, latent if half else k_rot, slots, mask, start, end, query_start, part, log,
        _apart(latent, slots), _apart(k_rot, slots), jump, latent_hopper.stride_of(end), *strides,
        S, longest_key, H // G, S, q_rot_rows.stride(0), N, scaling, softcap, window,
        G, C, P, latent.stride(-2), k_rot.stride(-2), half, kind, by_row, causal, window > 0, softcap > 0, direct,
        dot_precision(dtype), tile.rows, tile.tokens, block_c, block_p, tile.tokens if by_row else 1024,
        chained, num_warps=tile.warps, num_stages=tile.stages, **overlap(chained),
    )  # fmt: skip
    return _finish(part, log, sinks, value, out)


def _finish(part: Tensor, log: Tensor, sinks: Tensor | None, value: Tensor | None, out: Tensor) -> Tensor:
    if log is not out:
        return join(part, log, sinks, value, out)
    return out if value is None else values(out, value)


@_latent_decode.register_fake
def _latent_decode_fake(
    q_latent, q_rot, latent, k_rot, slots, mask, start, end, query_start, sinks,
    value, C, G, longest_query, longest_key, causal, scaling, softcap, window,
):  # fmt: skip
    B, H, S, _ = q_rot.shape
    return q_rot.new_empty((B, H, S, C) if value is None else (B, S, H, value.shape[1]))


def _splits(tiles: int, programs: int, room: int) -> int:
    """Parts of the context, so that the GPU, which has room for so many programs at once, is full."""
    return max(1, min(room // programs, tiles))


def _rows(x: Tensor) -> Tensor:
    """(B, 1, L, width) whose sequences lie a whole number of rows apart."""
    return x if x.stride(-1) == 1 and x.stride(0) % x.stride(-2) == 0 else x.contiguous()


def _apart(x: Tensor, slots: Tensor | None) -> int:
    """Rows between two sequences; none where slots say which rows are theirs, or all share them."""
    return 0 if slots is not None or x.shape[0] == 1 else x.stride(0) // x.stride(-2)


def latent_decode(
    q_latent_BHSC: Tensor | None,
    q_rot_BHSP: Tensor,
    latent_B1LC: Tensor,
    k_rot_B1LX: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    is_causal: bool | None = None,
    start_B: Tensor | None = None,
    end_B: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    value_HVC: Tensor | None = None,
) -> Tensor:
    """The absorbed form of latent attention.

        score[h, l] = (q_latent[h] · latent[l] + q_rot[h] · k_rot[l, g(h)]) · scaling        g(h) = ⌊h · G / H⌋
        out[h]      = (value[h] @) Σ_l softmax(score[h])[l] · latent[l]

    Args:
        q_latent_BHSC: queries with W_uk folded in; None where keys are rotary alone.
        q_rot_BHSP: rotated queries.
        latent_B1LC, k_rot_B1LX: the cache as stored, in any strides that are dense in the last dimension.
        attention_mask: broadcastable to (B, H, S, L), boolean or additive. Tiles that a boolean mask hides from every
            row are not read.
        is_causal: the queries are the last S tokens, and none sees those behind it; beside what the mask says. Left
            out: where there is no mask, or an end.
        start_B, end_B: integers, the first slot of each sequence and the one behind its last: 0 and L where left out.
            One end for all may have one element. A static cache costs what is written in it; up to 63 tokens more may
            be read, which must be finite. A sequence that ends behind L, in a cache that took too many, gets NaN.
        window: a causal query sees this many tokens, its own the last.
        softcap: scores become softcap · tanh(score / softcap). sinks_H: one more logit a head, in the divisor alone.
        value_HVC: W_uv, to be applied to the result.
    Returns:
        (B, H, S, C), or with value_HVC (B, S, H, V), in q_rot's dtype, summed in fp32; zeros for a query that sees
        nothing.
    Raises:
        ValueError: a mask that is not as long as the cache, or a window without causal queries.
    Gradients: none.
    Cost: reads B·L·(C + X) numbers once for G = 1 (the latents G times else, mostly from L2), with no host
        synchronisation; a grid from shapes alone, so that it can be captured. Deterministic.
    Source: absorption, arXiv:2405.04434; split over the context as in Flash-Decoding (crfm.stanford.edu/2023/10/12).
    """
    S, P = q_rot_BHSP.shape[2:]
    L, C = latent_B1LC.shape[-2:]
    if is_causal is None:
        is_causal = attention_mask is None or end_B is not None
    if attention_mask is not None and attention_mask.shape[-1] != L:
        raise ValueError(f"attention_mask is {attention_mask.shape[-1]} long, and the cache {L}")
    if window and not is_causal:
        raise ValueError(f"window={window} needs causal queries, got is_causal={is_causal}")
    return _latent_decode(
        q_latent_BHSC, q_rot_BHSP, _rows(latent_B1LC), _rows(k_rot_B1LX), None, attention_mask, start_B, end_B, None,
        sinks_H, value_HVC, C, k_rot_B1LX.shape[-1] // P, S, L, is_causal, scaling, softcap or 0.0, window or 0,
    )  # fmt: skip


def latent_decode_packed(
    q_latent_1HTC: Tensor | None,
    q_rot_1HTP: Tensor,
    latent: Tensor,
    k_rot: Tensor,
    *,
    query_start: Tensor,
    key_start: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float,
    slot_L: Tensor | None = None,
    latent_width: int | None = None,
    rotary_width: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    value_HVC: Tensor | None = None,
) -> Tensor:
    """`latent_decode` of sequences that stand one behind the other, their keys packed or in pages.

    Args:
        q_latent_1HTC, q_rot_1HTP: queries of all sequences.
        latent, k_rot: (1, 1, L, C) and (1, 1, L, X), packed like the queries. With slot_L: two tensors (slots, width)
            over the same memory, which hold the two halves of each token's C + X numbers.
        query_start, key_start: int32, where each sequence begins, and their ends last. A sequence's queries are its
            last tokens. Queries behind the last sequence are left unwritten.
        longest_query, longest_key: no sequence has more; they shape the grid.
        slot_L: the slot of each packed key, int32 or int64.
        latent_width, rotary_width: C and X, which the halves don't show.
    Returns:
        (1, H, T, C), or with value_HVC (1, T, H, V).
    Cost: pages are read where they are.
    """
    C = latent.shape[-1] if latent_width is None else latent_width
    X = k_rot.shape[-1] if rotary_width is None else rotary_width
    return _latent_decode(
        q_latent_1HTC, q_rot_1HTP, latent.contiguous(), k_rot.contiguous(), slot_L, None, key_start[:-1], key_start[1:],
        query_start, sinks_H, value_HVC, C, X // q_rot_1HTP.shape[-1], longest_query, longest_key, True, scaling,
        softcap or 0.0, window or 0,
    )  # fmt: skip
