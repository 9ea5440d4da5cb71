"""The second pass of attention split over the context: parts of a softmax become one, and for few rows values at once.

Letters: B batch, S queries, H heads, T rows (B·H·S), N parts a row, C latent width, V width of a value.
"""

from typing import NamedTuple

import torch
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


@triton.jit
def _join_values_kernel(
    part_ptr, log_ptr, sink_ptr, weight_ptr, out_ptr, weight_h, weight_v, H, S, N,
    C: tl.constexpr, V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    STEP: tl.constexpr, UNROLL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    token = tl.program_id(2).to(tl.int64)
    row = (token // S * H + h) * S + token % S
    c = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    # On its way while the first pass is ending.
    at = h * weight_h + v[:, None] * weight_v + c
    weight = tl.load(weight_ptr + at, mask=(v[:, None] < V) & (c < C), other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    log = tl.load(log_ptr + row * N + n, mask=n < N, other=float("-inf"))
    top = tl.max(log, 0)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + h).to(tl.float32) * LOG2_E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(log - base), 0)
    if sink_ptr is not None:
        total += tl.exp2(sink - base)
    # Summed over the parts of a step at the end alone: no program waits for its warps before.
    sums = tl.zeros((STEP, BLOCK_C), tl.float32)
    for begin in tl.range(0, N, STEP, loop_unroll_factor=UNROLL):
        m = begin + tl.arange(0, STEP)
        share = tl.exp2(tl.load(log_ptr + row * N + m, mask=m < N, other=float("-inf")) - base)
        part = tl.load(part_ptr + (row * N + m)[:, None] * C + c, mask=(m[:, None] < N) & (c < C), other=0.0)
        sums += part * share[:, None]
    joined = tl.sum(sums, 0) / tl.where(total > 0, total, 1.0)
    value = tl.sum(weight.to(tl.float32) * joined[None, :], 1)
    tl.store(out_ptr + (token * H + h) * V + v, value.to(out_ptr.dtype.element_ty), mask=v < V)


def joins_early(device: torch.device) -> bool:
    """Whether the second pass may be launched while the first is running: on Hopper, not in the interpreter."""
    return has_copy_engine(device) and device.type == "cuda"


class _Tile(NamedTuple):
    """Values of a head and parts of a row that a program takes at once, steps in flight, warps."""

    values: int
    step: int
    unroll: int
    warps: int


def _values_tile(width: int) -> _Tile:
    """The tile for latents of this width, a power of 2."""
    return _Tile(32, max(1, min(16, 8192 // width)), 2, 8)


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
    early = joins_early(device)
    options = {"launch_pdl": True} if early else {}
    if value_HVC is not None and B * S <= 4:
        V = value_HVC.shape[1]
        out = out_BHSC.new_empty((B, S, H, V))
        tile = _values_tile(power_of_2(C))
        block_v = min(power_of_2(V), tile.values)
        _join_values_kernel[(H, cdiv(V, block_v), B * S)](
            part_TNC, log_TN, sinks_H, value_HVC, out, value_HVC.stride(0), value_HVC.stride(1), H, S, N,
            C, V, max(power_of_2(C), 16), power_of_2(N), block_v, tile.step, tile.unroll, early,
            num_warps=tile.warps, **options,
        )  # fmt: skip
        return out
    # 16 Ki numbers a program at most, and few enough that two programs find work on each multiprocessor.
    n, block = power_of_2(N), max(power_of_2(C), 32)
    while block > 32 and (block * n > 16384 or T * cdiv(C, block) < 2 * processors(device)):
        block //= 2
    _join_kernel[(T, cdiv(C, block))](part_TNC, log_TN, sinks_H, out_BHSC, H, S, N, C, block, n, early, **options)
    return out_BHSC if value_HVC is None else values(out_BHSC, value_HVC)


def values(out_BHSC: Tensor, value_HVC: Tensor) -> Tensor:
    """(B, S, H, V)."""
    return torch.einsum("bhsc,hvc->bshv", out_BHSC, value_HVC)
