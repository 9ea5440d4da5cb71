"""What stands between the two projections: an activation, gated or not, and its gradient as one pass over the rows.

Letters: N routed rows, F expert width, H columns of the first projection (2F when gated, F when not).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launching import launched
from .routing import Routing
from .tuning import cdiv, power_of_2


class Gating(NamedTuple):
    """How the first projection's columns become the second one's input.

        a = act(min(gate, limit)) · (clip(up, -limit, limit) + up_offset)      gated
        a = act(h)                                                             not gated

    act is "swish" (z·σ(alpha·z): SiLU at alpha 1), "gelu", "gelu_tanh", "relu" or "relu2". limit None does not clip.
    interleaved says whether h is [gate0, up0, gate1, up1, ...] or [gate; up].
    """

    act: str = "swish"
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0
    gated: bool = True
    interleaved: bool = False

    @property
    def fan(self) -> int:
        """Columns of h for each column of a."""
        return 2 if self.gated else 1


# `Gating`'s fields as the arguments of an operator.
GATING_SCHEMA = "str act, float alpha, float? limit, float up_offset, bool gated, bool interleaved"


@triton.jit
def act_and_slope(z, alpha, ACT: tl.constexpr):
    """act(z) and its derivative, in fp32."""
    if ACT == "swish":
        s = tl.sigmoid(alpha * z)
        return z * s, s * (1.0 + alpha * z * (1.0 - s))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        return z * cdf, cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":
        # tanh(w) = 2σ(2w) - 1
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        return z * s, slope
    elif ACT == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.maximum(z, 0.0)
        return positive * positive, 2.0 * positive


@triton.jit
def gate_forward(gate, up, alpha, limit, up_offset, ACT: tl.constexpr, CLIP: tl.constexpr):
    if CLIP:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value, _ = act_and_slope(gate, alpha, ACT)
    return value * (up + up_offset)


@triton.jit
def gate_gradient(gate, up, da, alpha, limit, up_offset, ACT: tl.constexpr, CLIP: tl.constexpr, GATED: tl.constexpr):
    """(dgate, dup, a) in fp32, from what a gate read and the gradient of what it gave; dup means nothing ungated."""
    inside = gate == gate
    if CLIP:
        inside = gate <= limit
        gate = tl.minimum(gate, limit)
    value, slope = act_and_slope(gate, alpha, ACT)
    dup = da
    if GATED:
        up_inside = inside
        if CLIP:
            up_inside = (up >= -limit) & (up <= limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
        up += up_offset
        dup = da * value
        if CLIP:
            dup = tl.where(up_inside, dup, 0.0)
        slope *= up
        value *= up
    dgate = da * slope
    if CLIP:
        dgate = tl.where(inside, dgate, 0.0)
    return dgate, dup, value


@launched
@triton.jit
def _gating_gradient_kernel(
    h_ptr,
    da_ptr,
    weight_ptr,
    row_ptr,
    offset_ptr,
    index_ptr,
    dout_ptr,
    bias_ptr,
    dh_ptr,
    a_ptr,
    dweight_ptr,
    N,
    E,
    F,
    D,
    K,
    alpha,
    limit,
    up_offset,
    ACT: tl.constexpr,
    CLIP: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    owned = n < tl.load(offset_ptr + E)
    route = tl.load(row_ptr + n, mask=n < N, other=0)
    weight = tl.load(weight_ptr + route, mask=owned, other=0.0).to(tl.float32)[:, None]
    fan: tl.constexpr = 2 if GATED else 1
    step: tl.constexpr = 2 if INTERLEAVED else 1
    n64 = n.to(tl.int64)[:, None]
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)[None, :]
        mask = owned[:, None] & (f < F)
        da = tl.load(da_ptr + n64 * F + f, mask=mask, other=0.0).to(tl.float32)
        gate_at = n64 * (fan * F) + step * f
        gate = tl.load(h_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up_at = gate_at + (1 if INTERLEAVED else F)
            up = tl.load(h_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
        dgate, dup, value = gate_gradient(gate, up, weight * da, alpha, limit, up_offset, ACT, CLIP, GATED)
        tl.store(dh_ptr + gate_at, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(dh_ptr + up_at, dup.to(dh_ptr.dtype.element_ty), mask=mask)
        if STORE_A:
            tl.store(a_ptr + n64 * F + f, (weight * value).to(a_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(da * value, 1)
    if HAS_BIAS:
        expert = tl.load(index_ptr + route, mask=owned, other=0).to(tl.int64)[:, None]
        token = (route // K).to(tl.int64)[:, None]
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)[None, :]
            mask = owned[:, None] & (d < D)
            dout = tl.load(dout_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
            dweight += tl.sum(dout * tl.load(bias_ptr + expert * D + d, mask=mask, other=0.0).to(tl.float32), 1)
    tl.store(dweight_ptr + route, tl.where(owned, dweight, 0.0).to(dweight_ptr.dtype.element_ty), mask=n < N)


def gating_gradient(
    h_NH, da_NF, weight_TK, routing: Routing, gating: Gating, *, index_TK, dout_TD, bias_ED, store_a=True
):
    """The gradient of the gate and of the routing weights, and the second projection's weighted input, in one pass.

        dh[n] = w[n] · da[n] · ∂a/∂h[n]        wa[n] = w[n] · a[n]        dw[n] = ⟨da[n], a[n]⟩ + ⟨dout[n], bias[e]⟩

    ⟨dout, y⟩ is taken as ⟨down.T @ dout, a⟩: that is why the layer's rows of output need not be kept.

    Args:
        h_NH: the first projection's output, rows sorted by expert.
        da_NF: down.T @ dout for each row, without the routing weight. wa is written over it.
        weight_TK: routing weights, any float dtype.
        index_TK, dout_TD, bias_ED: experts, gradient of the layer's output and bias of the second projection; read
            only when bias_ED is given.
        store_a: whether wa is wanted (the second projection's weight is trained).
    Returns:
        (dh_NH, wa_NF or None, dw_TK): dw is exactly zero for a route of no expert.
    Cost: reads h and da, writes dh and wa: 12·N·F bytes in bf16 when gated.
    """
    N, F = da_NF.shape
    K = weight_TK.shape[1]
    D = dout_TD.shape[1]
    dh_NH, dweight_TK = torch.empty_like(h_NH), torch.empty_like(weight_TK, memory_format=torch.contiguous_format)
    block_f = min(max(power_of_2(F), 16), 1024)
    # The widest power of two that wastes no lane on a ragged end: 768 is three blocks of 256.
    while block_f > 128 and F % block_f:
        block_f //= 2
    block_n = max(1, 2048 // block_f)
    _gating_gradient_kernel[(cdiv(N, block_n),)](
        h_NH,
        da_NF,
        weight_TK.contiguous(),
        routing.row_N,
        routing.offset_E1,
        index_TK.contiguous(),
        dout_TD,
        bias_ED,
        dh_NH,
        da_NF,
        dweight_TK,
        N,
        routing.offset_E1.numel() - 1,
        F,
        D,
        K,
        gating.alpha,
        gating.limit if gating.limit is not None else 0.0,
        gating.up_offset,
        ACT=gating.act,
        CLIP=gating.limit is not None,
        GATED=gating.gated,
        INTERLEAVED=gating.gated and gating.interleaved,
        HAS_BIAS=bias_ED is not None,
        STORE_A=store_a,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_D=256,
        num_warps=4,
    )
    return dh_NH, da_NF if store_a else None, dweight_TK
