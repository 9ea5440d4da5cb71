"""The router: scores of all experts, and the best K of them, for few tokens in two launches.

Letters: T tokens, D hidden, E experts, K experts a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import chains, follow, overlap, prefetch
from .tuning import cdiv, power_of_2


@triton.jit
def _logits_kernel(
    x_ptr, weight_ptr, logit_ptr, D, E, CHAINED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    t = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    if CHAINED:
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D // LINE) * LINE
            prefetch(weight_ptr + e[:, None] * D + d, (e[:, None] < E) & (d < D), weight_ptr)
    follow(CHAINED)
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + e[:, None] * D + d, mask=(e[:, None] < E) & (d < D), other=0.0)
        total += x * weight.to(tl.float32)
    tl.store(logit_ptr + t * E + e, tl.sum(total, 1), mask=e < E)


@triton.jit
def _choose_kernel(
    logit_ptr, bias_ptr, index_ptr, weight_ptr, factor,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALISE: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    none = float("-inf")
    follow(CHAINED)
    logit = tl.load(logit_ptr + t * E + e, mask=e < E, other=none)
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    choice = tl.where(e < E, choice, none)
    if GROUPS > 1:
        group_of = e // (E // GROUPS)
        g = tl.arange(0, BLOCK_G)
        rank = tl.full((BLOCK_G,), none, tl.float32)
        for group in tl.static_range(GROUPS):
            inside = tl.where(group_of == group, choice, none)
            value = tl.max(inside, 0)
            if HAS_BIAS:
                # With a selection bias a group is ranked by its best two.
                value += tl.max(tl.where(e == tl.argmax(inside, 0), none, inside), 0)
            rank = tl.where(g == group, value, rank)
        allowed = e < 0
        for _ in tl.static_range(TOP_GROUPS):
            best = tl.argmax(rank, 0)
            allowed = allowed | (group_of == best)
            rank = tl.where(g == best, none, rank)
        choice = tl.where(allowed, choice, none)
    k = tl.arange(0, BLOCK_K)
    index = tl.zeros((BLOCK_K,), tl.int32)
    weight = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(K):
        best = tl.argmax(choice, 0)
        index = tl.where(k == i, best, index)
        weight = tl.where(k == i, tl.sum(tl.where(e == best, score, 0.0), 0), weight)
        choice = tl.where(e == best, none, choice)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 0) + 1e-20)
    tl.store(index_ptr + t * K + k, index.to(tl.int64), mask=k < K)
    tl.store(weight_ptr + t * K + k, weight * factor, mask=k < K)


def expert_choice(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    sigmoid: bool,
    groups: int = 1,
    top_groups: int = 1,
    normalise: bool,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best K experts of each token, as `HfMoeTopkRouter` chooses them.

        logits = x · Wᵀ      scores = sigmoid or softmax of them      chosen = top-K of scores + bias in the best groups
        weights = scores[chosen] (/ their sum) · factor

    Args:
        x_TD, weight_ED: fp32, bf16 or fp16; products and sums in fp32. bias_E: fp32, for the choice alone; with it a
            group is ranked by its best two experts, without by its best.
        groups, top_groups: E / groups experts in a row form a group, and a token uses the best `top_groups`.
    Returns:
        logits (T, E) fp32, weights (T, K) fp32, indices (T, K) int64, best first; the lower index wins a tie.
    Gradients: none.
    Cost: two launches; W is read once a token, mostly from L2: for few tokens.
    Source: arXiv:2412.19437 section 2.1.2.
    """
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    logits = torch.empty((T, E), dtype=torch.float32, device=x_TD.device)
    index = torch.empty((T, top_k), dtype=torch.int64, device=x_TD.device)
    weight = torch.empty((T, top_k), dtype=torch.float32, device=x_TD.device)
    if T == 0:
        return logits, weight, index
    chained, wide = chains(x_TD.device), min(max(power_of_2(D), 64), 2048)
    _logits_kernel[(cdiv(E, 2), T)](x_TD, weight_ED, logits, D, E, chained, 2, wide, **overlap(chained))
    _choose_kernel[(T,)](
        logits, logits if bias_E is None else bias_E, index, weight, factor,
        E, top_k, groups, top_groups, sigmoid, bias_E is not None, normalise,
        chained, power_of_2(E), power_of_2(top_k), power_of_2(groups), num_warps=1, **overlap(chained),
    )  # fmt: skip
    return logits, weight, index
