"""The second pass of attention split over the context: parts of a softmax become one, and for few rows values at once.

Letters: B batch, S queries, H heads, T rows (B·H·S), N parts a row, C latent width, V width of a value.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import chains, follow, overlap, prefetch
from .descriptors import processors
from .tuning import cdiv, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
# Of one row's parts, for 16 warps: 32 registers a thread.
_NUMBERS_AT_ONCE = 16384
# A number for every second thread.
_LOGS = 256


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["S"])
def _join_kernel(
    part_ptr, log_ptr, sink_ptr, out_ptr, H, S, N,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    follow(CHAINED)
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


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["S"])
def _join_values_kernel(
    part_ptr, log_ptr, sink_ptr, weight_ptr, out_ptr, weight_h, weight_v, H, S, N,
    C: tl.constexpr, V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    BLOCK_V: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    token = tl.program_id(2).to(tl.int64)
    row = (token // S * H + h) * S + token % S
    c = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, STEP)
    w_rows = weight_ptr + h * weight_h + v[:, None] * weight_v
    if CHAINED:
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, BLOCK_C // LINE) * LINE
        prefetch(w_rows + line, (v[:, None] < V) & (line < C), weight_ptr)
    follow(CHAINED)
    # Everything is asked for before the first sum: what takes time here are waits, not bytes.
    parts = part_ptr + row * N * C + c
    part = tl.load(parts + m[:, None] * C, mask=(m[:, None] < N) & (c < C), other=0.0)
    weight = tl.load(w_rows + c, mask=(v[:, None] < V) & (c < C), other=0.0)
    log = tl.load(log_ptr + row * N + n, mask=n < N, other=float("-inf"))
    top = tl.max(log, 0)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + h).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(log - base), 0)
    if sink_ptr is not None:
        total += tl.exp2(sink - base)
    sums = tl.zeros((STEP, BLOCK_C), tl.float32)
    for begin in range(0, N, STEP):
        ahead = begin + STEP + m[:, None]
        part_ahead = tl.load(parts + ahead * C, mask=(ahead < N) & (c < C), other=0.0)
        share = tl.load(log_ptr + row * N + begin + m, mask=begin + m < N, other=float("-inf"))
        sums += part * tl.exp2(share - base)[:, None]
        part = part_ahead
    joined = tl.sum(sums, 0) / tl.where(total > 0, total, 1.0)
    # Eight products in a thread before any shuffle.
    product = (weight.to(tl.float32) * joined[None, :]).reshape(BLOCK_V, BLOCK_C // 8, 8)
    value = tl.sum(tl.sum(product, 2), 1)
    tl.store(out_ptr + (token * H + h) * V + v, value.to(out_ptr.dtype.element_ty), mask=v < V)


def join(
    part_TNC: Tensor, log_TN: Tensor, sinks_H: Tensor | None, value_HVC: Tensor | None, out_BHSC: Tensor
) -> Tensor:
    """out[t] = Σ_n w[n] · part[t, n] / Σ_n w[n], with w = 2^log[t] and a head's sink e^sink in the divisor.

    Args:
        part_TNC: fp32 averages, each over its part of the keys. log_TN: log₂ of each part's divisor.
        value_HVC: what each head makes of its row; contiguous in C.
        out_BHSC: written, its rows those of `part`.
    Returns:
        out_BHSC, or with value_HVC its products (B, S, H, V). Up to four rows a head need no second launch for them.
    """
    (T, N, C), (B, H, S, _) = part_TNC.shape, out_BHSC.shape
    device = out_BHSC.device
    chained = chains(device)
    if value_HVC is not None and B * S <= 4:
        V = value_HVC.shape[1]
        out = out_BHSC.new_empty((B, S, H, V))
        block_c, block_v = max(power_of_2(C), 64), min(power_of_2(V), 32)
        # Few sizes, since each compiles anew as a text grows: all parts at once, or a step of them and a row of logs.
        step = max(_NUMBERS_AT_ONCE // block_c, 1)
        n = step if step >= N else max(power_of_2(N), _LOGS)
        _join_values_kernel[(H, cdiv(V, block_v), B * S)](
            part_TNC, log_TN, sinks_H, value_HVC, out, value_HVC.stride(0), value_HVC.stride(1), H, S, N,
            C, V, block_c, n, step, block_v, chained, num_warps=16, **overlap(chained),
        )  # fmt: skip
        return out
    # 16 Ki numbers a program at most, and few enough that two programs find work on each multiprocessor.
    n, block = power_of_2(N), max(power_of_2(C), 32)
    while block > 32 and (block * n > 16384 or T * cdiv(C, block) < 2 * processors(device)):
        block //= 2
    _join_kernel[(T, cdiv(C, block))](
        part_TNC, log_TN, sinks_H, out_BHSC, H, S, N, C, block, n, chained, **overlap(chained)
    )
    return out_BHSC if value_HVC is None else values(out_BHSC, value_HVC)


def values(out_BHSC: Tensor, value_HVC: Tensor) -> Tensor:
    """(B, S, H, V)."""
    return torch.einsum("bhsc,hvc->bshv", out_BHSC, value_HVC)
