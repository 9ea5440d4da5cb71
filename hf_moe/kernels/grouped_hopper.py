"""`grouped_linear` and `up_projection` on Hopper: tokens gathered beside the copy engine, results stored in its shadow.

Letters: N routed rows, I input columns, O output columns, E experts, F expert width, H = 2F.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma, warpgroup_mma_wait

from . import warpgroups as wg
from .descriptors import can_describe, processors
from .gating import Gating, gate_forward
from .launching import launched
from .routing import Routing
from .tile_order import tile_of
from .tuning import SPECIALIZED_DEPTH, Tile, cdiv
from .warpgroups import BK, COLUMNS, SLOTS, STAGES

_tile_of = gluon.jit(tile_of.fn)
_gate = gluon.jit(gate_forward.fn)


@gluon.jit
def _look_up(tile_ptr, capacity, work, tiles, columns, WIDTH: gl.constexpr, GROUP: gl.constexpr):
    """Column, expert, first row and end row of a piece of work; the last one's where there is no more."""
    tiles = gl.maximum(tiles, 1)
    tile, column = _tile_of(gl.minimum(work, tiles * columns - 1), tiles, columns, GROUP)
    expert = gl.load(tile_ptr + tile)
    first = gl.load(tile_ptr + capacity + tile)
    last = gl.load(tile_ptr + 2 * capacity + tile)
    return column * WIDTH, expert, first, last


@gluon.jit
def _routes(row_ptr, first, last, ROWS: gl.constexpr):
    """The routes of a tile's rows, 64 for each warpgroup."""
    r = first + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    near = gl.load(row_ptr + r, mask=r < last, other=0)
    return near, gl.load(row_ptr + r + 64, mask=r + 64 < last, other=0)


@gluon.jit
def _copy(
    x, w, row_ptr, tile_ptr, left, right, full, empty, capacity, N_IN, columns, x_stride, PER_TOKEN,
    GATED: gl.constexpr, IN_FIRST: gl.constexpr, GATHER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    RIGHT: gl.constexpr = 2 * COLUMNS * BK
    LEFT: gl.constexpr = 2 * 64 * BK
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BK, BK // 8], [4, 1], [1, 0])
    tiles = gl.load(tile_ptr + 3 * capacity)
    begin, jump = gl.program_id(0), gl.num_programs(0)
    # What a tile needs to know is read a tile ahead, and so are its rows' routes.
    column, expert, first, last = _look_up(tile_ptr, capacity, begin, tiles, columns, WIDTH, GROUP)
    next_column, next_expert, next_first, next_last = _look_up(
        tile_ptr, capacity, begin + jump, tiles, columns, WIDTH, GROUP
    )
    if GATHER:
        near, far = _routes(row_ptr, first, last, ROWS)
    stage, phase = 0, 1
    for work in range(begin, tiles * columns, jump):
        later_column, later_expert, later_first, later_last = _look_up(
            tile_ptr, capacity, work + 2 * jump, tiles, columns, WIDTH, GROUP
        )
        if GATHER:
            c = gl.arange(0, BK, gl.SliceLayout(0, ROWS))[None, :]
            x_near = x + (near // PER_TOKEN).to(gl.int64)[:, None] * x_stride + c
            x_far = x + (far // PER_TOKEN).to(gl.int64)[:, None] * x_stride + c
            near, far = _routes(row_ptr, next_first, next_last, ROWS)
        both = last - first > 64
        for k in range(0, N_IN, BK):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if GATHER:
                mbarrier.expect(bar, RIGHT)
            elif both:
                mbarrier.expect(bar, RIGHT + 2 * LEFT)
            else:
                mbarrier.expect(bar, RIGHT + LEFT)
            if IN_FIRST:
                wg.fetch(w, [expert, k, column], bar, right.index(stage))
            elif GATED:
                wg.fetch(w, [expert, 0, column, k], bar, right.index(stage))
            else:
                wg.fetch(w, [expert, column, k], bar, right.index(stage))
            if GATHER:
                wg.gather(left.index(stage * 2), x_near + k)
                if both:
                    wg.gather(left.index(stage * 2 + 1), x_far + k)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                wg.fetch(x, [first, k], bar, left.index(stage * 2))
                if both:
                    wg.fetch(x, [first + 64, k], bar, left.index(stage * 2 + 1))
            stage, phase = wg.following(stage, phase)
        column, expert, first, last = next_column, next_expert, next_first, next_last
        next_column, next_expert, next_first, next_last = later_column, later_expert, later_first, later_last


@gluon.jit
def _send(
    PART: gl.constexpr, packed, y, a, first, rows, column, staging, slot, alphas, limit, up_offset, WG: gl.constexpr,
    GATED: gl.constexpr, STORE_H: gl.constexpr, ACT: gl.constexpr, CLIP: gl.constexpr,
):  # fmt: skip
    """Store a part of a finished tile: 64 columns of y, or of h's gate, h's up, or a."""
    c0, c1, c2 = wg.ragged(first, rows, 0)
    if GATED:
        HALF: gl.constexpr = PART // 3 if STORE_H else PART
        near, far = wg.halves(packed)
        gate, up = wg.unpack(far if HALF == 1 else near)
        at = column + 64 * HALF
        if STORE_H and PART % 3 == 0:
            wg.store(y, [c0, c1, c2, 0, at], wg.stage_out(gate, staging, slot, WG))
        elif STORE_H and PART % 3 == 1:
            wg.store(y, [c0, c1, c2, 1, at], wg.stage_out(up, staging, slot, WG))
        else:
            # Read from shared memory, so that the compiler cannot begin this before the products are under way.
            alpha = alphas.load(gl.SliceLayout(1, gate.type.layout))[:, None]
            value = _gate(gate.to(gl.float32), up.to(gl.float32), alpha, limit, up_offset, ACT, CLIP)
            wg.store(a, [c0, c1, c2, 0, at], wg.stage_out(value, staging, slot, WG))
    else:
        value = wg.quarter(packed, PART)
        wg.store(y, [c0, c1, c2, 0, column + 64 * PART], wg.stage_out(value, staging, slot, WG))
    return (slot + 1) % SLOTS


@gluon.jit
def _multiply(
    y, a, tile_ptr, left, right, full, empty, open_, staging, alphas, capacity, N_IN, columns, limit, up_offset,
    WG: gl.constexpr, GATED: gl.constexpr, STORE_H: gl.constexpr, IN_FIRST: gl.constexpr, GATHER: gl.constexpr,
    ACT: gl.constexpr, CLIP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    WIDTH: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    PARTS: gl.constexpr = (6 if STORE_H else 2) if GATED else 4
    tiles = gl.load(tile_ptr + 3 * capacity)
    begin, jump = gl.program_id(0), gl.num_programs(0)
    next_column, _, next_first, next_last = _look_up(tile_ptr, capacity, begin, tiles, columns, WIDTH, GROUP)
    stage, phase, slot = 0, 0, 0
    # The tile that waits to be stored; at first one without rows.
    packed = wg.pack(gl.zeros([64, COLUMNS], gl.float32, LAYOUT))
    done_first, done_rows, done_column = 0, 0, 0
    for work in range(begin, tiles * columns, jump):
        column, first, rows = next_column, next_first + 64 * WG, next_last - next_first - 64 * WG
        next_column, _, next_first, next_last = _look_up(tile_ptr, capacity, work + jump, tiles, columns, WIDTH, GROUP)
        if rows > 0:
            total = gl.zeros([64, COLUMNS], gl.float32, LAYOUT)
            before = stage
            for part in gl.static_range(PARTS):
                total = wg.step(left, right, full, total, stage, phase, part == 0, WG, False, IN_FIRST, GATHER)
                if part > 0:
                    wg.give_back(empty, before)
                # Always open, but a loop: the compiler moves nothing from below to above the products.
                mbarrier.wait(open_.index(0), 1)
                slot = _send(
                    part, packed, y, a, done_first, done_rows, done_column, staging, slot, alphas, limit, up_offset,
                    WG, GATED, STORE_H, ACT, CLIP,
                )  # fmt: skip
                before = stage
                stage, phase = wg.following(stage, phase)
            for _ in range(PARTS * BK, N_IN, BK):
                total = wg.step(left, right, full, total, stage, phase, False, WG, False, IN_FIRST, GATHER)
                wg.give_back(empty, before)
                before = stage
                stage, phase = wg.following(stage, phase)
            total = warpgroup_mma_wait(0, deps=[total])
            wg.give_back(empty, before)
            packed = wg.pack(total)
            done_first, done_rows, done_column = first, rows, column
        else:
            for _ in range(0, N_IN, BK):
                stage, phase = wg.skip(full, empty, stage, phase)
    for part in gl.static_range(PARTS):
        slot = _send(
            part, packed, y, a, done_first, done_rows, done_column, staging, slot, alphas, limit, up_offset, WG, GATED,
            STORE_H, ACT, CLIP,
        )  # fmt: skip
    tma.store_wait(0)


@launched
@gluon.jit(do_not_specialize=["capacity", "columns", "PER_TOKEN"])
def _grouped_kernel(
    x, w, y, a, row_ptr, tile_ptr, capacity, N_IN, columns, x_stride, alpha, limit, up_offset, PER_TOKEN,
    GATED: gl.constexpr, STORE_H: gl.constexpr, IN_FIRST: gl.constexpr, GATHER: gl.constexpr, ACT: gl.constexpr,
    CLIP: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = w.dtype
    left = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, BK], gl.NVMMASharedLayout(128, 16))
    right = gl.allocate_shared_memory(dtype, wg.ring(STAGES, w.block_shape), w.layout)
    staging = gl.allocate_shared_memory(dtype, wg.ring(2 * SLOTS, a.block_shape), a.layout)
    alphas = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty, open_ = wg.barriers(GATHER)
    alphas.store(gl.full([64], 0.0, gl.float32, gl.BlockedLayout([1], [32], [4], [0])) + alpha)
    # The arguments stand here because a tuple with a name would turn constants into tensors.
    gl.warp_specialize(
        [
            (_multiply, (
                y, a, tile_ptr, left, right, full, empty, open_, staging, alphas, capacity, N_IN, columns, limit,
                up_offset, 0, GATED, STORE_H, IN_FIRST, GATHER, ACT, CLIP, GROUP,
            )),
            (_multiply, (
                y, a, tile_ptr, left, right, full, empty, open_, staging, alphas, capacity, N_IN, columns, limit,
                up_offset, 1, GATED, STORE_H, IN_FIRST, GATHER, ACT, CLIP, GROUP,
            )),
            (_copy, (
                x, w, row_ptr, tile_ptr, left, right, full, empty, capacity, N_IN, columns, x_stride, PER_TOKEN,
                GATED, IN_FIRST, GATHER, GROUP,
            )),
        ],
        [4, 4 if GATHER else 1],
        [232, 40],
    )  # fmt: skip


def suits(
    x: Tensor, weight_EOI: Tensor, tile: Tile, *, gating: Gating | None = None, bias: Tensor | None = None,
    adapter: object = None,
) -> bool:  # fmt: skip
    """Whether the kernel takes these: a tile that asks for it, bfloat16 that the copy engine can describe.

    I is a multiple of 64, from 384 to SPECIALIZED_DEPTH. Gate and up are halves of the weight's rows. No bias, adapter.
    """
    if not wg.asked_for(tile, x) or bias is not None or adapter is not None:
        return False
    _, n_out, n_in = weight_EOI.shape
    in_first = weight_EOI.stride(2) != 1
    if gating is not None and (in_first or not gating.gated or gating.interleaved or n_out % 16):
        return False
    if n_in % 64 or not 384 <= n_in <= SPECIALIZED_DEPTH or n_out % 8 or x.stride(0) % 16:
        return False
    return can_describe(x) and can_describe(weight_EOI.transpose(1, 2) if in_first else weight_EOI)


def product(
    x: Tensor, weight_EOI: Tensor, routing: Routing, tile: Tile, y: Tensor | None, a: Tensor | None = None, *,
    per_token: int | None, gating: Gating | None = None,
) -> None:  # fmt: skip
    """Write y as `grouped_linear` would or, with a gating, h to y (unless None) and a to a as `up_projection` would."""
    E, n_out, n_in = weight_EOI.shape
    in_first, groups = weight_EOI.stride(2) != 1, 2 if gating else 1
    part = n_out // groups
    stored = weight_EOI.transpose(1, 2) if in_first else weight_EOI
    sizes, strides = list(stored.shape), list(stored.stride())
    block = [1, 64, 256] if in_first else [1, 256, 64]
    if gating:
        sizes, strides = [E, 2, part, n_in], [strides[0], part * strides[1], strides[1], 1]
        block = [1, 2, 128, 64]
    y_out = None if y is None else wg.ragged_descriptor(y, [64, 64], groups)
    a_out = y_out if a is None else wg.ragged_descriptor(a, [64, 64], 1)
    columns = cdiv(part, 256 // groups)
    gate = gating or Gating()
    _grouped_kernel[(min(routing.max_tiles * columns, processors(x.device)),)](
        x if per_token else wg.descriptor(x, x.shape, x.stride(), [64, 64]),
        wg.descriptor(weight_EOI, sizes, strides, block),
        y_out or a_out, a_out, routing.row_N, routing.tile, routing.capacity, n_in, columns, x.stride(0), gate.alpha,
        gate.limit if gate.limit is not None else 0.0, gate.up_offset, per_token or 1,
        gating is not None, gating is not None and y is not None, in_first, per_token is not None, gate.act,
        gate.limit is not None, tile.group, num_warps=4, maxnreg=168,
    )  # fmt: skip
