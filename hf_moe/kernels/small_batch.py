"""Experts of a few tokens, bound by the bytes of the weights: each program finds its expert's tokens itself, unsorted.

    out[t] = Σ_k weight[t, k] · (down[e] @ gate(up[e] @ x[t] + up_bias[e]) + down_bias[e])      e = index[t, k]

Letters: T tokens, K experts a token, N = T·K routes, E experts, I input columns, O output columns, D hidden, F expert
width, H = 2F (gated) or F.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import tuning
from .chain import chains, follow, overlap
from .descriptors import dense_rows, dot_precision
from .gating import Gating
from .single_rows import gate_arguments, gated, single_rows, weight_rows
from .tuning import Tile, cdiv, power_of_2


@triton.jit(do_not_specialize=["T"])
def _expert_rows_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, index_ptr,
    T, K, E, I, O, gap, x_stride, w_stride_e, w_stride_o, w_stride_i, alpha, limit, up_offset,
    ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, PER_TOKEN: tl.constexpr, BY_EXPERT: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    FAN: tl.constexpr = 2 if GATED else 1
    BN: tl.constexpr = FAN * BLOCK
    block, slot = tl.program_id(0), tl.program_id(1)
    follow(CHAINED)
    t = tl.arange(0, BLOCK_T)
    expert = slot
    n = t[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    known = (t[:, None] < T) & (tl.arange(0, BLOCK_K)[None, :] < K)
    owner = tl.load(index_ptr + n, mask=known, other=-1).to(tl.int32)
    if not BY_EXPERT:
        # A program for each route: the first one of an expert does its work.
        expert = tl.load(index_ptr + slot).to(tl.int32)
    route = tl.min(tl.where(owner == expert, n, T * K), 1)
    mine = route < T * K
    count = tl.sum(mine.to(tl.int32), 0)
    if not BY_EXPERT:
        count = tl.where((expert < 0) | (expert >= E) | (tl.min(route, 0) < slot), 0, count)
    if count == 0:
        return
    rank = tl.where(mine, tl.cumsum(mine.to(tl.int32), 0) - 1, -1)
    offset, number, exists = weight_rows(tl.arange(0, BN), block, O, gap, w_stride_o, GATED, INTERLEAVED, BLOCK)
    w_rows = w_ptr + expert.to(tl.int64) * w_stride_e + offset
    for first in range(0, count, BM):
        r = first + tl.arange(0, BM)
        row = tl.sum(tl.where(rank[None, :] == r[:, None], route[None, :], 0), 1)
        token = row // K
        x_rows = x_ptr + (token if PER_TOKEN else row).to(tl.int64) * x_stride
        # The weights are the tall operand: their rows fill a tensor core's tile, few tokens do not.
        h = tl.zeros((BN, BM), tl.float32)
        for start in range(0, I, BK):
            k = start + tl.arange(0, BK)
            w_ptrs = w_rows[:, None] + k.to(tl.int64)[None, :] * w_stride_i
            if EVEN:
                x = tl.load(x_rows[:, None] + k[None, :])
                w = tl.load(w_ptrs, eviction_policy="evict_first")
            else:
                x = tl.load(x_rows[:, None] + k[None, :], mask=k[None, :] < I, other=0.0)
                w = tl.load(w_ptrs, mask=exists[:, None] & (k[None, :] < I), other=0.0, eviction_policy="evict_first")
            h = tl.dot(w, x.T, h, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * (FAN * O) + number, mask=exists, other=0.0)
            h += bias.to(tl.float32)[:, None]
        y = gated(h.T, alpha, limit, up_offset, ACT, CLIP, GATED, INTERLEAVED, BM, BLOCK).to(y_ptr.dtype.element_ty)
        out = block * BLOCK + tl.arange(0, BLOCK)
        mask = (r[:, None] < count) & (out[None, :] < O)
        # A token may name its expert twice.
        for choice in range(K):
            to = token * K + choice
            chosen = tl.load(index_ptr + to, mask=r < count, other=-1).to(tl.int32) == expert
            tl.store(y_ptr + to.to(tl.int64)[:, None] * O + out[None, :], y, mask=chosen[:, None] & mask)


def expert_rows(
    x: torch.Tensor,
    weight_EHI: torch.Tensor,
    index_TK: torch.Tensor,
    tile: Tile,
    *,
    columns: int,
    gap: int = 0,
    gating: Gating | None = None,
    bias_EH: torch.Tensor | None = None,
    per_token: bool = False,
) -> torch.Tensor:
    """Multiply each route's row by its expert's matrix, an expert's routes together, and keep the routes' order.

        y[n] = gate(W[e] @ x[n] + bias[e])      e = index[n]; x[n // K] with per_token

    Args:
        x: (N, I), or (T, I) tokens with per_token; fp32, bf16 or fp16, contiguous in I.
        weight_EHI: x's dtype, one side of each matrix contiguous.
        index_TK: contiguous int32 or int64. Routes with an id outside 0 .. E-1 stay unwritten.
        tile: m rows at a time, n rows of the weights a program, k of I at a time.
        columns, gap, gating: as for `single_rows`.
        bias_EH: contiguous.
    Returns:
        y_NO in x's dtype, accumulated in fp32.
    Cost: reads an expert's weights once for every m tokens that chose it; one launch. Each program reads the whole
        index, so it is meant for some hundred tokens at most.
    """
    E, _, n_in = weight_EHI.shape
    T, K = index_TK.shape
    N = T * K
    y_NO = x.new_empty((N, columns))
    by_expert = N >= E
    chained = chains(x.device)
    block = tile.n // (1 if gating is None else gating.fan)
    _expert_rows_kernel[(cdiv(columns, block), E if by_expert else N)](
        x, weight_EHI, bias_EH, y_NO, index_TK,
        T, K, E, n_in, columns, gap, x.stride(0), *weight_EHI.stride(),
        *gate_arguments(gating),
        bias_EH is not None, per_token, by_expert, chained,
        max(power_of_2(T), 16), power_of_2(K), tile.m, block, tile.k,
        n_in % tile.k == 0 and columns % block == 0, dot_precision(x.dtype),
        num_warps=tile.warps, num_stages=tile.stages, **overlap(chained),
    )  # fmt: skip
    return y_NO


@triton.jit
def _weigh_kernel(
    y_ptr, weight_ptr, index_ptr, out_ptr, E, D, K, CHAINED: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.program_id(1)
    follow(CHAINED)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(K):
        n = token * K + k
        expert = tl.load(index_ptr + n).to(tl.int32)
        width = tl.where((expert >= 0) & (expert < E), D, 0)
        y = tl.load(y_ptr + n.to(tl.int64) * D + d, mask=d < width, other=0.0).to(tl.float32)
        # A route of no expert adds nothing, even when its weight is not finite.
        total += tl.where(d < width, y * tl.load(weight_ptr + n).to(tl.float32), 0.0)
    tl.store(out_ptr + token.to(tl.int64) * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def weigh(y_ND: torch.Tensor, weight_TK: torch.Tensor, index_TK: torch.Tensor, n_experts: int) -> torch.Tensor:
    """out[t] = Σ_k weight[t, k] · y[t·K + k] over routes that have an expert, in fp32; y from `expert_rows`."""
    (T, K), D = index_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty((T, D))
    block, chained = min(power_of_2(D), 512), chains(y_ND.device)
    _weigh_kernel[(cdiv(D, block), T)](
        y_ND, weight_TK, index_TK, out_TD, n_experts, D, K, chained, block, num_warps=2, **overlap(chained)
    )
    return out_TD


def experts(
    x_TD: torch.Tensor,
    index_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    up_EHD: torch.Tensor,
    down_EDF: torch.Tensor,
    up_bias_EH: torch.Tensor | None,
    down_bias_ED: torch.Tensor | None,
    gating: Gating,
) -> torch.Tensor:
    """`layer.experts` without gradients, for few tokens.

    Cost: bytes of the experts that are chosen; two launches for `tuning.SINGLE_ROWS` tokens, three for more. No
        host synchronisation, no atomics, a grid from shapes alone: deterministic, and can be captured.
    """
    T, K = index_TK.shape
    E, D, F = down_EDF.shape
    device, dtype = x_TD.device, x_TD.dtype
    index_TK, weight_TK = index_TK.contiguous(), weight_TK.contiguous()
    up: dict[str, Any] = {"columns": F, "gap": F * up_EHD.stride(1), "gating": gating, "bias_EH": up_bias_EH}
    down: dict[str, Any] = {"columns": D, "bias_EH": down_bias_ED}
    if T <= tuning.SINGLE_ROWS and up_EHD.stride(2) == 1 and down_EDF.stride(2) == 1:
        a = single_rows(x_TD, up_EHD, index_TK, tuning.single_rows_tile(device, dtype, 1), per_token=K, **up)
        return single_rows(
            a, down_EDF, index_TK, tuning.single_rows_tile(device, dtype, K), weight_TK=weight_TK, **down
        )
    tile = tuning.small_batch_tile(device, dtype)
    a = expert_rows(x_TD, up_EHD, index_TK, tile, per_token=True, **up)
    y = expert_rows(a, down_EDF, index_TK, tile, **down)
    return weigh(y, weight_TK, index_TK, E)


def _product(x_TI: torch.Tensor, weight_OI: torch.Tensor, **options) -> torch.Tensor:
    tile = tuning.single_rows_tile(x_TI.device, x_TI.dtype, 1)
    return single_rows(dense_rows(x_TI), weight_OI[None], None, tile, columns=weight_OI.shape[0], **options)


@torch.library.custom_op("hf_moe::few_rows_linear", mutates_args=())
def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _product(x, dense_rows(weight))


@_linear.register_fake
def _linear_fake(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]))


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for a row or two of x, no gradients. Each row reads the weight, the second one from L2; one launch.

    Args:
        x_TI, weight_OI: fp32, bf16 or fp16, the same for both.
    """
    return _linear(x_TI, weight_OI)


@torch.library.custom_op("hf_moe::gated_mlp", mutates_args=())
def _gated_mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, added: torch.Tensor | None, act: str
) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    # One kernel reads both: up's rows lie this many elements after gate's, wherever the two were allocated.
    gap = (up.data_ptr() - gate.data_ptr()) // gate.element_size()
    a = _product(x, gate, gap=gap, gating=Gating(act))
    return _product(a, dense_rows(down), added_RO=added)


@_gated_mlp.register_fake
def _gated_mlp_fake(x, gate, up, down, added, act):
    return x.new_empty((x.shape[0], down.shape[0]))


def gated_mlp(
    x_TD: torch.Tensor,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
    down_DF: torch.Tensor,
    act: str = "swish",
    added_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """down @ (act(gate @ x) · (up @ x)) + added for a token or two, no gradients: a shared expert or a dense layer.

    Args:
        x_TD: any number of tokens, but each reads the weights: from three on cuBLAS does better.
        gate_FD, up_FD, down_DF: x's dtype: fp32, bf16 or fp16.
        act: a name that `Gating` knows; "swish" is SiLU.
        added_TD: contiguous, in x's dtype; the sum is rounded once.
    Returns:
        out_TD in x's dtype, each product accumulated in fp32. Two launches, deterministic, can be captured.
    """
    return _gated_mlp(x_TD, gate_FD, up_FD, down_DF, added_TD, act)
