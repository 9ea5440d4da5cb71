"""The second pass of attention split over the context: parts of a softmax become one.

Letters: T rows (queries times heads), N parts a row, C latent width, H heads, S rows a head.
"""

import triton
import triton.language as tl
from torch import Tensor

from .descriptors import has_copy_engine, processors
from .tuning import cdiv, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _join_kernel(
    part_ptr, log_ptr, sink_ptr, out_ptr, H, S, N,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        # Launched while the first pass is ending, this waits for its last store.
        tl.extra.cuda.gdc_wait()
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
    # 16 Ki numbers a program at most, and few enough that two programs find work on each multiprocessor.
    n, block = power_of_2(N), max(power_of_2(C), 32)
    while block > 32 and (block * n > 16384 or T * cdiv(C, block) < 2 * processors(out.device)):
        block //= 2
    early = has_copy_engine(out.device) and out.device.type == "cuda"
    _join_kernel[(T, cdiv(C, block))](
        part_TNC, log_TN, sinks_H, out, H, S, N, C, block, n, early, **({"launch_pdl": True} if early else {})
    )
