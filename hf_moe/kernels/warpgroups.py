"""What the Hopper kernels of grouped products share: two warpgroups multiply, others copy, through a ring of stages.

    copying warps     wait until a stage is empty  →  fill it  →  the copies themselves mark it full
    warpgroup 0, 1    wait until a stage is full  →  64 × 256 of its tile's product each  →  give it back

A warpgroup rounds a finished tile to bfloat16, two numbers a register, begins the next tile at once, and stores the
finished one while the tensor cores work: its results cost them nothing but that rounding.

`tl.dot` cannot say this: all warps multiply, and then all of them store.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.tools.ragged_tma import to_ragged_indices

from .tuning import Tile

# Triton 3.6 has names of its own for these.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
ragged = gluon.jit(to_ragged_indices.fn)

# Tiles are 128 rows (64 for each warpgroup) × 256 columns × 64 deep; four stages and the results fill shared memory.
BK = gl.constexpr(64)
STAGES = gl.constexpr(4)
COLUMNS = gl.constexpr(256)
SLOTS = gl.constexpr(2)  # 64 × 64 results of a warpgroup on their way out


@gluon.constexpr_function
def ring(count, block):
    """The shape of so many buffers."""
    return [count, *block]


@gluon.jit
def barriers(GATHER: gl.constexpr):
    """One for each full and each empty stage, and one that is always open."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    always = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Every copying thread says when its own copies have come.
        mbarrier.init(full.index(stage), count=129 if GATHER else 1)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(always.index(0), count=1)
    return full, empty, always


@gluon.jit
def following(stage, phase):
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def give_back(empty, stage):
    """Tell the copying warps that this warpgroup has read a stage."""
    barrier()
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def step(
    left, right, full, total, stage, phase, FIRST: gl.constexpr, WG: gl.constexpr, LEFT_TURNED: gl.constexpr,
    RIGHT_TURNED: gl.constexpr, FENCED: gl.constexpr,
):  # fmt: skip
    """Begin total += left @ right on one stage, FIRST without the old total; the step before it is done on return.

    *_TURNED: the operand lies in shared memory with its depth outside. FENCED: ordinary copies wrote it.
    """
    mbarrier.wait(full.index(stage), phase)
    if FENCED:
        fence_async_shared()
    if LEFT_TURNED:
        left_tile = left.index(stage * 2 + WG).reshape([BK, 64]).permute((1, 0))
    else:
        left_tile = left.index(stage * 2 + WG)
    if RIGHT_TURNED:
        right_tile = right.index(stage).reshape([BK, COLUMNS])
    else:
        right_tile = right.index(stage).reshape([COLUMNS, BK]).permute((1, 0))
    total = warpgroup_mma(left_tile, right_tile, total, use_acc=not FIRST, is_async=True)
    return warpgroup_mma_wait(1, deps=[total])


@gluon.jit
def skip(full, empty, stage, phase):
    """Give back a stage without a look at it; the next stage and its phase."""
    mbarrier.wait(full.index(stage), phase)
    give_back(empty, stage)
    return following(stage, phase)


@gluon.jit
def halves(value):
    """The left and the right half of the columns."""
    HALF: gl.constexpr = value.shape[1] // 2
    return value.reshape([64, 2, HALF]).permute([0, 2, 1]).split()


@gluon.jit
def pack(total):
    """Columns c and c + 128, rounded to bfloat16, in one register."""
    low, high = halves(total)
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpack(packed):
    low = (packed & 0xFFFF).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return low, (packed >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)


@gluon.jit
def quarter(packed, PART: gl.constexpr):
    """64 of the 256 columns."""
    near, far = halves(packed)
    low, high = unpack(far if PART % 2 == 1 else near)
    return high if PART >= 2 else low


@gluon.jit
def stage_out(value, staging, slot, WG: gl.constexpr):
    """A buffer with 64 × 64 results, from which the copy engine may store them."""
    tma.store_wait(SLOTS - 1)
    barrier()
    buffer = staging.index(WG * SLOTS + slot)
    buffer.reshape([64, 64]).store(value.to(buffer.dtype))
    fence_async_shared()
    barrier()
    return buffer


def asked_for(tile: Tile, x: Tensor) -> bool:
    """Whether a tile leaves the work to these kernels, and x is bfloat16: all that they have been run with."""
    return tile.specialized and tile.m == 128 and x.dtype == torch.bfloat16


def descriptor(x: Tensor, shape, strides, block: list[int]) -> TensorDescriptor:
    """Blocks of x; what lies outside of shape is read as zeros and not written."""
    layout = gl.NVMMASharedLayout(min(128, 2 * block[-1]), 16, rank=len(block))
    return TensorDescriptor(x, list(shape), list(strides), block, layout)


def ragged_descriptor(x: Tensor, block: list[int], groups: int | None = None) -> TensorDescriptor:
    """Blocks of rows that end where an expert's rows end; with groups of columns, a column's group comes before it.

    See triton.tools.ragged_tma: a row's address is the sum of three coordinates, of which the third stops at the end.
    """
    row, part = x.stride(0), x.shape[1] // (groups or 1)
    shape, strides, box = [0x7FFF0000, 0x7FFF0000, 2**30, part], [2**34 - row, row, row, 1], [1, 1, *block]
    if groups is not None:
        shape[3:3], strides[3:3], box[3:3] = [groups], [part], [1]
    return descriptor(x, shape, strides, box)
