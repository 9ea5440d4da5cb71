"""Between tokens and their routed rows: sum a token's rows, or give each row its token.

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden.
"""

import torch
import triton
import triton.language as tl

from .launching import launched
from .routing import Routing
from .tuning import cdiv, power_of_2


@launched
@triton.jit
def _combine_kernel(
    y_ptr, weight_ptr, position_ptr, out_ptr, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        position = tl.load(position_ptr + token * K + k).to(tl.int64)
        width = tl.where(position >= 0, D, 0)
        row = tl.load(y_ptr + position * D + d, mask=d < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weight_ptr + token * K + k).to(tl.float32)
        # A route of no expert adds nothing, even when its weight is not finite.
        total += tl.where(d < width, row, 0.0)
    tl.store(out_ptr + token * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def combine(y_ND: torch.Tensor, weight_TK: torch.Tensor | None, routing: Routing, K: int, dtype=None) -> torch.Tensor:
    """Sum each token's rows, in fp32 and in the order of its routes.

        out[t] = Σ_k weight[t, k] · y[position[t, k]]      over routes that have an expert

    Args:
        y_ND: rows sorted by expert.
        weight_TK: any float dtype; None sums without weights (the gradient of `spread`).
        K: experts a token.
        dtype: of the result; y's when None.
    Cost: reads N·D, writes T·D. A gather rather than atomics: deterministic, and 1.4 times as fast.
    """
    N, D = y_ND.shape
    out_TD = torch.empty((N // K, D), dtype=dtype or y_ND.dtype, device=y_ND.device)
    block = min(power_of_2(D), 1024)
    _combine_kernel[(N // K, cdiv(D, block))](
        y_ND,
        y_ND if weight_TK is None else weight_TK.contiguous(),
        routing.position_N,
        out_TD,
        D,
        K,
        weight_TK is not None,
        block,
        num_warps=4 if block >= 512 else 1,
    )
    return out_TD


@launched
@triton.jit
def _spread_kernel(x_ptr, position_ptr, y_ptr, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(x_ptr + token * D + d, mask=d < D, other=0.0)
    for k in tl.static_range(K):
        position = tl.load(position_ptr + token * K + k).to(tl.int64)
        tl.store(y_ptr + position * D + d, row, mask=d < tl.where(position >= 0, D, 0))


def spread(x_TD: torch.Tensor, routing: Routing, K: int) -> torch.Tensor:
    """Copy each token to its rows: y[position[t, k]] = x[t]. Rows of no expert stay unwritten.

    Cost: reads T·D, writes N·D: written from the token's side, so that x is read once and not K times.
    """
    T, D = x_TD.shape
    y_ND = x_TD.new_empty((T * K, D))
    block = min(power_of_2(D), 1024)
    _spread_kernel[(T, cdiv(D, block))](x_TD, routing.position_N, y_ND, D, K, block, num_warps=4 if block >= 512 else 1)
    return y_ND
