"""`weight_gradient` on Hopper: tokens gathered beside the copy engine, results stored in the shadow of the next tile.

Letters: N routed rows, O and I the two sides of a weight matrix, E experts.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma, warpgroup_mma_wait

from . import warpgroups as wg
from .descriptors import can_describe, processors
from .launching import launched
from .routing import Routing
from .tile_order import block_of
from .tuning import Tile, cdiv
from .warpgroups import BK, COLUMNS, SLOTS, STAGES

_block_of = gluon.jit(block_of.fn)


@gluon.jit
def _copy(
    left, right, row_ptr, offset_ptr, left_tiles, right_tiles, full, empty, E, out_tiles, in_tiles, left_stride,
    right_stride, N_OUT, N_IN, PER_TOKEN, LEFT_GATHER: gl.constexpr, RIGHT_GATHER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    LEFT: gl.constexpr = 0 if LEFT_GATHER else 2 * 128 * BK
    RIGHT: gl.constexpr = 0 if RIGHT_GATHER else 2 * COLUMNS * BK
    GATHER: gl.constexpr = LEFT_GATHER or RIGHT_GATHER
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if GATHER:
        r = gl.arange(0, BK, gl.SliceLayout(1, ROWS))
    stage, phase = 0, 1
    for work in range(gl.program_id(0), E * out_tiles * in_tiles, gl.num_programs(0)):
        expert, out, column = _block_of(work, E, out_tiles, in_tiles, 128, COLUMNS, GROUP)
        first = gl.load(offset_ptr + expert)
        last = gl.load(offset_ptr + expert + 1)
        if GATHER:
            if LEFT_GATHER:
                c = out + gl.arange(0, 64, gl.SliceLayout(0, ROWS))
            else:
                c = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, ROWS))
            route = gl.load(row_ptr + first + r, mask=first + r < last, other=0)
        for at in range(first, last, BK):
            if GATHER:
                token = (route // PER_TOKEN).to(gl.int64)[:, None]
                # What follows an expert's last row is copied as zeros.
                owned = (at + r < last)[:, None]
                ahead = at + BK + r
                route = gl.load(row_ptr + ahead, mask=ahead < last, other=0)
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, LEFT + RIGHT)
            c0, c1, c2 = wg.ragged(first, last - first, at - first)
            if not LEFT_GATHER:
                wg.fetch(left, [c0, c1, c2, out], bar, left_tiles.index(stage * 2))
                wg.fetch(left, [c0, c1, c2, out + 64], bar, left_tiles.index(stage * 2 + 1))
            if not RIGHT_GATHER:
                wg.fetch(right, [c0, c1, c2, column], bar, right_tiles.index(stage))
            if LEFT_GATHER:
                rows = left + token * left_stride + c[None, :]
                wg.gather(left_tiles.index(stage * 2), rows, mask=owned & (c < N_OUT)[None, :])
                wg.gather(left_tiles.index(stage * 2 + 1), rows + 64, mask=owned & (c + 64 < N_OUT)[None, :])
            if RIGHT_GATHER:
                rows = right + token * right_stride + c[None, :]
                wg.gather(right_tiles.index(stage), rows, mask=owned & (c < N_IN)[None, :])
            if GATHER:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            stage, phase = wg.following(stage, phase)


@gluon.jit
def _send(PART: gl.constexpr, packed, dw, expert, out, column, staging, slot, WG: gl.constexpr):
    """Store a quarter of a finished tile."""
    value = wg.quarter(packed, PART)
    wg.store(dw, [expert, out, column + 64 * PART], wg.stage_out(value, staging, slot, WG))
    return (slot + 1) % SLOTS


@gluon.jit
def _multiply(
    dw, offset_ptr, left, right, full, empty, open_, staging, E, out_tiles, in_tiles, WG: gl.constexpr,
    GATHER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    stage, phase, slot = 0, 0, 0
    # The tile that waits to be stored; at first one of no expert.
    packed = wg.pack(gl.zeros([64, COLUMNS], gl.float32, LAYOUT))
    done_expert, done_out, done_column = E, 0, 0
    for work in range(gl.program_id(0), E * out_tiles * in_tiles, gl.num_programs(0)):
        expert, out, column = _block_of(work, E, out_tiles, in_tiles, 128, COLUMNS, GROUP)
        first = gl.load(offset_ptr + expert)
        last = gl.load(offset_ptr + expert + 1)
        total = gl.zeros([64, COLUMNS], gl.float32, LAYOUT)
        if last - first > 3 * BK:
            before = stage
            for part in gl.static_range(4):
                total = wg.step(left, right, full, total, stage, phase, part == 0, WG, True, True, GATHER)
                if part > 0:
                    wg.give_back(empty, before)
                # Always open, but a loop: the compiler moves nothing from below to above the products.
                mbarrier.wait(open_.index(0), 1)
                slot = _send(part, packed, dw, done_expert, done_out, done_column, staging, slot, WG)
                before = stage
                stage, phase = wg.following(stage, phase)
            for _ in range(first + 4 * BK, last, BK):
                total = wg.step(left, right, full, total, stage, phase, False, WG, True, True, GATHER)
                wg.give_back(empty, before)
                before = stage
                stage, phase = wg.following(stage, phase)
            total = warpgroup_mma_wait(0, deps=[total])
            wg.give_back(empty, before)
        else:
            # Too few steps to hide stores behind. None is in flight where the branches meet, or all would be serial.
            for part in gl.static_range(4):
                slot = _send(part, packed, dw, done_expert, done_out, done_column, staging, slot, WG)
            for _ in range(first, last, BK):
                total = wg.step(left, right, full, total, stage, phase, False, WG, True, True, GATHER)
                total = warpgroup_mma_wait(0, deps=[total])
                wg.give_back(empty, stage)
                stage, phase = wg.following(stage, phase)
        packed = wg.pack(total)
        done_expert, done_out, done_column = expert, out + 64 * WG, column
    for part in gl.static_range(4):
        slot = _send(part, packed, dw, done_expert, done_out, done_column, staging, slot, WG)
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["E", "out_tiles", "in_tiles", "PER_TOKEN"])
def _weight_gradient_kernel(
    left, right, dw, row_ptr, offset_ptr, E, out_tiles, in_tiles, left_stride, right_stride, N_OUT, N_IN, PER_TOKEN,
    LEFT_GATHER: gl.constexpr, RIGHT_GATHER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = dw.dtype
    GATHER: gl.constexpr = LEFT_GATHER or RIGHT_GATHER
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    if LEFT_GATHER:
        left_tiles = gl.allocate_shared_memory(dtype, [STAGES * 2, BK, 64], wide)
    else:
        left_tiles = gl.allocate_shared_memory(dtype, wg.ring(STAGES * 2, left.block_shape), left.layout)
    if RIGHT_GATHER:
        right_tiles = gl.allocate_shared_memory(dtype, [STAGES, BK, COLUMNS], wide)
    else:
        right_tiles = gl.allocate_shared_memory(dtype, wg.ring(STAGES, right.block_shape), right.layout)
    staging = gl.allocate_shared_memory(dtype, wg.ring(2 * SLOTS, dw.block_shape), dw.layout)
    full, empty, open_ = wg.barriers(GATHER)
    # The arguments stand here because a tuple with a name would turn constants into tensors.
    gl.warp_specialize(
        [
            (_multiply, (
                dw, offset_ptr, left_tiles, right_tiles, full, empty, open_, staging, E, out_tiles, in_tiles, 0, GATHER,
                GROUP,
            )),
            (_multiply, (
                dw, offset_ptr, left_tiles, right_tiles, full, empty, open_, staging, E, out_tiles, in_tiles, 1, GATHER,
                GROUP,
            )),
            (_copy, (
                left, right, row_ptr, offset_ptr, left_tiles, right_tiles, full, empty, E, out_tiles, in_tiles,
                left_stride, right_stride, N_OUT, N_IN, PER_TOKEN, LEFT_GATHER, RIGHT_GATHER, GROUP,
            )),
        ],
        [4, 4 if GATHER else 1],
        [224 if GATHER else 240, 56 if GATHER else 24],
    )  # fmt: skip


def suits(left: Tensor, right: Tensor, tile: Tile) -> bool:
    """Whether the kernel takes these: a tile that asks for it, bfloat16 that the copy engine can describe."""
    if not wg.asked_for(tile, left) or left.stride(0) % 16 or right.stride(0) % 16:
        return False
    return can_describe(left) and can_describe(right)


def product(
    left: Tensor, right: Tensor, routing: Routing, tile: Tile, dw: Tensor, *, left_per_token: int | None,
    right_per_token: int | None,
) -> None:  # fmt: skip
    """Write dw as `weight_gradient` would."""
    E, n_out, n_in = dw.shape
    out_tiles, in_tiles = cdiv(n_out, 128), cdiv(n_in, 256)
    _weight_gradient_kernel[(min(E * out_tiles * in_tiles, processors(left.device)),)](
        left if left_per_token else wg.ragged_descriptor(left, [64, 64]),
        right if right_per_token else wg.ragged_descriptor(right, [64, 256]),
        wg.descriptor(dw, dw.shape, dw.stride(), [1, 64, 64]), routing.row_N, routing.offset_E1, E, out_tiles, in_tiles,
        left.stride(0), right.stride(0), n_out, n_in, left_per_token or right_per_token or 1,
        left_per_token is not None, right_per_token is not None, tile.group,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
