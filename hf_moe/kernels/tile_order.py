"""In which order programs walk through the tiles of a grouped product, so that what neighbours read is found in L2."""

import triton
import triton.language as tl


@triton.jit
def tile_of(work, tiles, columns, GROUP: tl.constexpr):
    """Walk GROUP row tiles for each column tile, so that an expert's weights and rows meet in L2."""
    width = GROUP * columns
    first = (work // width) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    return first + (work % width) % height, (work % width) // height


@triton.jit
def block_of(work, E, out_tiles, in_tiles, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Expert and corner of a block; a few output tiles at a time, so that both sides' rows are found in L2.

    With GROUP 0 all experts first: they walk through the tokens side by side, and read each once from memory.
    """
    if GROUP == 0:
        expert = work % E
        within = work // E
        return expert, (within // in_tiles) * BM, (within % in_tiles) * BN
    expert = work // (out_tiles * in_tiles)
    within = work % (out_tiles * in_tiles)
    width = GROUP * in_tiles
    start = (within // width) * GROUP
    height = tl.minimum(out_tiles - start, GROUP)
    return expert, (start + (within % width) % height) * BM, ((within % width) // height) * BN
