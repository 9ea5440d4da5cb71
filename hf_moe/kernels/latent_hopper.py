"""`latent_decode` for many heads on Hopper, where arithmetic is the limit: three kinds of warps around one shared tile.

    copying warp    latents of tile i + 1  →  shared memory, by the bulk copy engine
    warpgroup A     scores of tile i = q · tileᵀ, softmax, weights → shared memory; left half of sums += weights · tile
    warpgroup B     right half of sums += weights · tile, while A is at the scores of the next tile

64 rows of sums are 64·C numbers in fp32: one warpgroup's registers hold half of them, so the columns are shared out.
`tl.dot` cannot say this: a dot that feeds another is computed by both warpgroups in full.

Letters: B sequences, S queries a sequence, H heads, G groups, R = H/G·S rows that share keys, L tokens, C latent width,
P rotary width, N splits of the context.
Source: the division of work is FlashMLA's (github.com/deepseek-ai/FlashMLA), written anew.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .descriptors import can_describe
from .tuning import cdiv, nvidia_generation, power_of_2
from .warpgroups import barrier, fetch

LOG2_E = gl.constexpr(1.4426950408889634)
BLOCK = gl.constexpr(64)  # rows, and tokens


@gluon.jit
def _copy(
    descriptors, buffers, barriers, place, out_ptr,
    C: gl.constexpr, P: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    q_latent, q_rot, latent, k_rot = descriptors
    q_left, q_right, q_rotary, left, right, rotary, _, _ = buffers
    asked, full, empty, _, _ = barriers
    b, g, row, _, low, first, last, _, _ = place
    HALF: gl.constexpr = WIDE // 2
    PARTS: gl.constexpr = q_rotary.shape[1] + WIDE
    mbarrier.expect(asked.index(0), 2 * BLOCK * PARTS)
    fetch(q_rot, [row, 0], asked.index(0), q_rotary)
    fetch(q_latent, [row, 0], asked.index(0), q_left)
    fetch(q_latent, [row, HALF], asked.index(0), q_right)
    for tile in range(first, last):
        stage = (tile - first) % STAGES
        mbarrier.wait(empty.index(stage), (((tile - first) // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        at = low + tile * BLOCK
        mbarrier.expect(bar, 2 * BLOCK * PARTS)
        fetch(k_rot, [b, at, g * P], bar, rotary.index(stage))
        fetch(latent, [b, at, 0], bar, left.index(stage))
        fetch(latent, [b, at, HALF], bar, right.index(stage))


@gluon.jit
def _store(
    out_ptr, sums, divisor, column, place,
    C: gl.constexpr, WIDE: gl.constexpr, DIRECT: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    _, _, row, rows, _, _, _, split, N = place
    HALF: gl.constexpr = WIDE // 2
    r = gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT)) + column
    here = (row + r).to(gl.int64)
    if not DIRECT:
        here = here * N + split
    value = (sums / divisor[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + (here * C)[:, None] + c[None, :], value, mask=(r < rows)[:, None] & (c < C)[None, :])


@gluon.jit
def _right(
    descriptors, buffers, barriers, place, out_ptr,
    C: gl.constexpr, P: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    _, _, _, _, right, _, weights, shrinks = buffers
    _, full, empty, passed, taken = barriers
    _, _, _, _, _, first, last, _, _ = place
    HALF: gl.constexpr = WIDE // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    sums = gl.zeros([BLOCK, HALF], gl.float32, LAYOUT)
    for tile in range(first, last):
        stage = (tile - first) % STAGES
        mbarrier.wait(full.index(stage), ((tile - first) // STAGES) & 1)
        mbarrier.wait(passed.index(0), (tile - first) & 1)
        sums = sums * shrinks.load(ROWS)[:, None]
        sums = warpgroup_mma(weights, right.index(stage).reshape([BLOCK, HALF]), sums, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        barrier()
        mbarrier.arrive(taken.index(0), count=1)
        mbarrier.arrive(empty.index(stage), count=1)
    mbarrier.wait(passed.index(0), (last - first) & 1)
    _store(out_ptr, sums, shrinks.load(ROWS), HALF, place, C, WIDE, DIRECT, LAYOUT)


@gluon.jit
def _scores_and_left(
    buffers, barriers, place, out_ptr, log_ptr, mask_ptr, mask_l, start, end, S, scale, cap, window,
    C: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, CAPPED: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    q_left, q_right, q_rotary, left, right, rotary, weights, shrinks = buffers
    asked, full, empty, passed, taken = barriers
    _, _, row, rows, low, first, last, split, N = place
    SCORE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    HALF: gl.constexpr = WIDE // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    r = gl.arange(0, BLOCK, gl.SliceLayout(1, SCORE))
    l = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORE))
    # A block of rows starts at a multiple of S or within one query's heads: both give s = row % S.
    until = end + gl.zeros_like(r)
    if CAUSAL:
        until = end - S + (row + r) % S + 1
    top = gl.full([BLOCK], float("-inf"), gl.float32, gl.SliceLayout(1, SCORE))
    total = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, SCORE))
    sums = gl.zeros([BLOCK, HALF], gl.float32, LAYOUT)
    at = low + first * BLOCK + l
    if KEPT:
        next_kept = gl.load(mask_ptr + at * mask_l, mask=at < end, other=0)
    mbarrier.wait(asked.index(0), 0)
    for tile in range(first, last):
        stage = (tile - first) % STAGES
        at = low + tile * BLOCK + l
        if KEPT:
            kept = next_kept
            next_kept = gl.load(mask_ptr + (at + BLOCK) * mask_l, mask=at + BLOCK < end, other=0)
        mbarrier.wait(full.index(stage), ((tile - first) // STAGES) & 1)
        left_tile = left.index(stage).reshape([BLOCK, HALF])
        right_tile = right.index(stage).reshape([BLOCK, HALF])
        rotary_tile = rotary.index(stage).reshape([BLOCK, q_rotary.shape[1]])
        score = gl.zeros([BLOCK, BLOCK], gl.float32, SCORE)
        score = warpgroup_mma(q_rotary, rotary_tile.permute((1, 0)), score, use_acc=False, is_async=True)
        score = warpgroup_mma(q_left, left_tile.permute((1, 0)), score, is_async=True)
        score = warpgroup_mma(q_right, right_tile.permute((1, 0)), score, is_async=True)
        score = warpgroup_mma_wait(0, deps=[score])
        if CAPPED:
            score = cap * (1.0 - 2.0 / (gl.exp2(score * (2.0 * LOG2_E * scale / cap)) + 1.0)) * LOG2_E
        else:
            score = score * (scale * LOG2_E)
        seen = at[None, :] < until[:, None]
        if WINDOW:
            seen = seen & (at[None, :] >= (until - window)[:, None])
        if KEPT:
            seen = seen & (kept != 0)[None, :]
        score = gl.where(seen, score, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, 1))
        base = gl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = gl.exp2(top - base)
        weight = gl.exp2(score - base[:, None])
        total = total * shrink + gl.sum(weight, 1)
        top = new_top
        mbarrier.wait(taken.index(0), ((tile - first) & 1) ^ 1)
        weights.store(weight.to(weights.dtype))
        shrinks.store(shrink)
        fence_async_shared()
        barrier()
        mbarrier.arrive(passed.index(0), count=1)
        sums = sums * gl.convert_layout(shrink, ROWS)[:, None]
        sums = warpgroup_mma(weights, left_tile, sums, is_async=True)
        # Waiting here and not in the next tile: in flight across the loop's edge, the compiler would serialise them.
        sums = warpgroup_mma_wait(0, deps=[sums])
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    divisor = gl.where(total > 0, total, 1.0)
    mbarrier.wait(taken.index(0), ((last - first) & 1) ^ 1)
    shrinks.store(divisor)
    barrier()
    mbarrier.arrive(passed.index(0), count=1)
    if not DIRECT:
        gl.store(log_ptr + (row + r) * N + split, top + gl.log2(divisor), mask=r < rows)
    _store(out_ptr, sums, gl.convert_layout(divisor, ROWS), 0, place, C, WIDE, DIRECT, LAYOUT)


@gluon.jit(do_not_specialize=["R", "L", "N"], do_not_specialize_on_alignment=["S"])
def _attend_kernel(
    q_latent, q_rot, latent, k_rot, out_ptr, log_ptr, mask_ptr, start_ptr, end_ptr, end_b, mask_b, mask_l,
    R, S, L, N, scale, cap, window,
    G: gl.constexpr, C: gl.constexpr, P: gl.constexpr, WIDE: gl.constexpr, WIDE_P: gl.constexpr, STAGES: gl.constexpr,
    KEPT: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, CAPPED: gl.constexpr, DIRECT: gl.constexpr,
):  # fmt: skip
    split = gl.program_id(1)
    b = gl.program_id(2) // G
    g = gl.program_id(2) % G
    begin = gl.program_id(0) * BLOCK
    low, high = 0, L
    if start_ptr is not None:
        low = gl.load(start_ptr + b).to(gl.int32)
    if end_ptr is not None:
        high = gl.load(end_ptr + b * end_b).to(gl.int32)
        # A cache that took more tokens than it has slots: nobody may read on, or believe the result.
        scale = gl.where(high > L, float("nan"), scale)
        high = gl.minimum(high, L)
    if WINDOW:
        low = gl.maximum(low, high - S + 1 - window)
    tiles = gl.cdiv(gl.maximum(high - low, 0), BLOCK)
    place = (b, g, (b * G + g) * R + begin, R - begin, low, tiles * split // N, tiles * (split + 1) // N, split, N)

    HALF: gl.constexpr = WIDE // 2
    dtype: gl.constexpr = latent.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    q_left = gl.allocate_shared_memory(dtype, [BLOCK, HALF], wide)
    q_right = gl.allocate_shared_memory(dtype, [BLOCK, HALF], wide)
    q_rotary = gl.allocate_shared_memory(dtype, [BLOCK, WIDE_P], q_rot.layout)
    left = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, HALF], latent.layout)
    right = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, HALF], latent.layout)
    rotary = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, WIDE_P], k_rot.layout)
    weights = gl.allocate_shared_memory(dtype, [BLOCK, BLOCK], wide)
    shrinks = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    asked = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    passed = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(asked.index(0), count=1)
    mbarrier.init(passed.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    descriptors = (q_latent, q_rot, latent, k_rot)
    buffers = (q_left, q_right, q_rotary, left, right, rotary, weights, shrinks)
    barriers = (asked, full, empty, passed, taken)
    mask_ptr += b.to(gl.int64) * mask_b
    # The arguments stand here because a tuple with a name would turn constants into tensors.
    gl.warp_specialize(
        [
            (_scores_and_left, (
                buffers, barriers, place, out_ptr, log_ptr, mask_ptr, mask_l, low, high, S, scale, cap, window,
                C, WIDE, STAGES, KEPT, CAUSAL, WINDOW, CAPPED, DIRECT,
            )),
            (_right, (descriptors, buffers, barriers, place, out_ptr, C, P, WIDE, STAGES, DIRECT)),
            (_copy, (descriptors, buffers, barriers, place, out_ptr, C, P, WIDE, STAGES, DIRECT)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def suits(q_latent: Tensor | None, q_rot_rows: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes these: 16-bit, at most 512 and 128 wide in steps of 8, no mask by head or query."""
    if q_latent is None or latent.dtype not in (torch.bfloat16, torch.float16) or latent.device.type != "cuda":
        return False
    if nvidia_generation(latent.device) != 9:
        return False
    if not q_latent.dtype == q_rot_rows.dtype == k_rot.dtype == latent.dtype:
        return False
    C, P = latent.shape[-1], q_rot_rows.shape[-1]
    if C > 512 or C % 8 or P > 128 or P % 8:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1] > 1 or mask.shape[2] > 1):
        return False
    return all(can_describe(x) for x in (q_rot_rows, latent, k_rot))


def _stages(wide: int, wide_p: int) -> int:
    """Tiles in flight: what shared memory holds beside the queries and the weights."""
    return min((226 * 1024 - 2 * 64 * 64) // (2 * 64 * (wide + wide_p)) - 1, 6)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Blocks of x; what lies outside of it is read as zeros."""
    layout = gl.NVMMASharedLayout(min(128, 2 * block[-1]), 16, rank=len(block))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


def stride_of(end: Tensor | None) -> int:
    """Between two sequences' ends; 0 where they share one."""
    return 0 if end is None or end.numel() == 1 else end.stride(0)


def attend(
    q_latent: Tensor, q_rot_rows: Tensor, latent: Tensor, k_rot: Tensor, mask: Tensor | None, start: Tensor | None,
    end: Tensor | None, out: Tensor, log: Tensor, G: int, L: int, N: int, causal: bool, scaling: float, softcap: float,
    window: int,
) -> None:  # fmt: skip
    """Averages of N parts of the context in `out` (rows, N, C) and log₂ of their divisors in `log`; N = 1: the result.

    Args:
        q_latent: (B, H, S, C), contiguous. q_rot_rows: (B·H·S, P). latent, k_rot: (B, 1, L, C) and (B, 1, L, X).
        Others as in `latent_decode`.
    """
    (B, H, S, _), P = q_latent.shape, q_rot_rows.shape[-1]
    C, R = latent.shape[-1], H // G * S
    wide, wide_p = max(power_of_2(C), 128), max(power_of_2(P), 16)
    mask_b, mask_l = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3))
    _attend_kernel[(cdiv(R, 64), N, B * G)](
        _descriptor(q_latent.view(-1, C), [64, wide // 2]), _descriptor(q_rot_rows, [64, wide_p]),
        _descriptor(latent.squeeze(1), [1, 64, wide // 2]), _descriptor(k_rot.squeeze(1), [1, 64, wide_p]), out, log,
        out if mask is None else mask.view(torch.uint8), start, end, stride_of(end),
        mask_b, mask_l, R, S, L, N, scaling, softcap, window,
        G, C, P, wide, wide_p, _stages(wide, wide_p),
        mask is not None, causal, window > 0, softcap > 0, log is out,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
