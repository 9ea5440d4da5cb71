"""What `grouped_linear` and `up_projection` compute for a tile of rows: an expert's product, an adapter's beside it.

    total[n] = w[e] @ x[row] + b[e] @ z[n]

Letters: N routed rows, I input columns, O output columns, E experts, R rank of an adapter, G groups of output columns
(gate and up: 2).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .descriptors import can_describe, row_descriptor, weight_descriptor
from .tuning import Tile


@triton.jit
def dot_rows(
    x,
    w,
    z,
    b,
    row_ptr,
    expert,
    first,
    last,
    column,
    N_IN,
    GROUP_OUT,
    R,
    PER_TOKEN,
    x_stride,
    w_stride_e,
    w_stride_o,
    w_stride_i,
    b_stride_e,
    b_stride_o,
    b_stride_r,
    GATHER: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    IN_FIRST: tl.constexpr,
    ADAPTED: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x[first : first + BM] @ w[expert, G column groups].T in fp32; rows from `last` on are unspecified.

    ADAPTED adds z[first : first + BM] @ b[expert, …].T: the rank is so many more columns of input, and not a second
    loop, because one loop is one pipeline.
    """
    left, low_left = x, z
    if not X_TMA:
        rows = first + tl.arange(0, BM)
        if GATHER:
            tokens = tl.load(row_ptr + rows, mask=rows < last, other=0) // PER_TOKEN
        else:
            tokens = tl.minimum(rows, last - 1)
        left = x + tokens.to(tl.int64)[:, None] * x_stride
        if ADAPTED:
            low_left = z + tl.minimum(rows, last - 1).to(tl.int64)[:, None] * R
    right, low_right = w, b
    out = tl.arange(0, BN)
    out_in_group = column + out % (BN // G)
    if not W_TMA:
        out = (out // (BN // G)) * GROUP_OUT + out_in_group
        right = w + expert.to(tl.int64) * w_stride_e + out.to(tl.int64)[None, :] * w_stride_o
        if ADAPTED:
            low_right = b + expert.to(tl.int64) * b_stride_e + out.to(tl.int64)[None, :] * b_stride_o
    end = N_IN
    if ADAPTED:
        depth = tl.cdiv(N_IN, BK) * BK
        end = depth + R
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, end, BK):
        near, wide, width, start = left, right, N_IN, k
        if ADAPTED:
            low = k >= depth
            width = tl.where(low, R, N_IN)
            start = tl.where(low, k - depth, k)
            if low:
                near = low_left
                wide = low_right
        at = start + tl.arange(0, BK)
        if X_TMA:
            x_tile = near.load([first, start])
        elif EVEN_K and not ADAPTED:
            x_tile = tl.load(near + at[None, :])
        else:
            x_tile = tl.load(near + at[None, :], mask=at[None, :] < width, other=0.0)
        if W_TMA:
            if IN_FIRST:
                w_tile = wide.load([expert, start, 0, column]).reshape(BK, BN)
            else:
                w_tile = wide.load([expert, 0, column, start]).reshape(BN, BK).T
        else:
            w_ptrs = wide + at.to(tl.int64)[:, None] * w_stride_i
            if ADAPTED and low:
                w_ptrs = wide + at.to(tl.int64)[:, None] * b_stride_r
            w_mask = (at[:, None] < width) & (out_in_group[None, :] < GROUP_OUT)
            w_tile = tl.load(w_ptrs, mask=w_mask, other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
    return total


class Adapter(NamedTuple):
    """A low-rank term of a grouped linear, y[n] += b[e] @ z[n]. z is usually a[e] @ x[row].

    z_NR: x's dtype, contiguous.
    b_EOR: x's dtype; copied unless its long side lies in memory as the weight's does. A rank of 16-byte rows is fast.
    """

    z_NR: torch.Tensor
    b_EOR: torch.Tensor

    def beside(self, in_first: bool) -> "Adapter":
        """With b in the memory order of a weight."""
        b_EOR = self.b_EOR
        if b_EOR.stride(1 if in_first else 2) == 1:
            return self
        turned = b_EOR.transpose(1, 2).contiguous().transpose(1, 2) if in_first else b_EOR.contiguous()
        return Adapter(self.z_NR, turned)

    def described(self, in_first: bool) -> bool:
        """Whether bulk copies can read both parts."""
        return can_describe(self.z_NR) and can_describe(self.b_EOR.transpose(1, 2) if in_first else self.b_EOR)

    def arguments(self, groups: int, tile: Tile, x_tma: bool, w_tma: bool) -> tuple:
        """z, b, R and the strides of b, as the kernels take them; without an adapter they take NO_ADAPTER."""
        z = row_descriptor(self.z_NR, tile.m, tile.k) if x_tma else self.z_NR
        b = weight_descriptor(self.b_EOR, groups, tile.n, tile.k) if w_tma else self.b_EOR
        return z, b, self.z_NR.shape[1], *self.b_EOR.stride()


NO_ADAPTER = (None, None, 0, 0, 0, 0)
