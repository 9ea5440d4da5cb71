"""The second pass of attention split over the context: parts of a softmax become one.

Letters: T rows (queries times heads), N parts a row, C latent width, H heads, S rows a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from .tuning import cdiv, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _join_kernel(
    part_ptr, log_ptr, sink_ptr, out_ptr, H, S, N,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    log = tl.load(log_ptr + row * N + n, mask=n < N, other=float("-inf"))
    part = tl.load(part_ptr + (row * N + n)[:, None] * C + c, mask=(n[:, None] < N) & (c < C), other=0.0)
    top = tl.max(log, 0)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + (row // S) % H).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(log - base)
    total = tl.sum(weight, 0)
    if sink_ptr is not None:
        total += tl.exp2(sink - base)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * C + c, out.to(out_ptr.dtype.element_ty), mask=c < C)


def join(part_TNC: Tensor, log_TN: Tensor, sinks_H: Tensor | None, out: Tensor) -> None:
    """Write out[t] = Σ_n w[n] · part[t, n] / Σ_n w[n], with w = 2^log[t] and a head's sink e^sink in the divisor.

    Args:
        part_TNC: fp32 averages, each over its part of the keys. log_TN: log₂ of each part's divisor.
        out: (B, H, S, C), its rows those of `part`.
    """
    (T, N, C), (_, H, S, _) = part_TNC.shape, out.shape
    # 16 Ki numbers a program, so that many programs share few rows.
    n = power_of_2(N)
    block = max(min(power_of_2(C), 128, 16384 // n), 16)
    _join_kernel[(T, cdiv(C, block))](part_TNC, log_TN, sinks_H, out, H, S, N, C, block, n)
