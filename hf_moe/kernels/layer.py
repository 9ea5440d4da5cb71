"""The expert layer as operators that autograd, torch.compile and CUDA graphs see whole.

    out[t] = Σ_k weight[t, k] · (down[e] @ gate(up[e] @ x[t] + up_bias[e]) + down_bias[e])      e = index[t, k]

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, F expert width, H = 2F (gated) or F, E experts.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import grouped_hopper, small_batch, tuning, weight_gradient_hopper
from .combine import combine, spread
from .descriptors import dense_side
from .gating import GATING_SCHEMA, Gating, gating_gradient
from .grouped_linear import grouped_linear
from .operators import Operator
from .routing import ROUTING_SCHEMA, Routing, route, tile_capacity
from .up_projection import up_projection
from .weight_gradient import bias_gradient, weight_gradient_as

_WEIGHTS = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"

_library = torch.library.Library("hf_moe", "FRAGMENT")
_library.define(f"experts(Tensor x, Tensor index, Tensor weight, {_WEIGHTS}, {GATING_SCHEMA}, bool recompute)"
                " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
_library.define(f"experts_inference(Tensor x, Tensor index, Tensor weight, {_WEIGHTS}, {GATING_SCHEMA}) -> Tensor")
_library.define(f"experts_backward(Tensor dout, Tensor x, Tensor h, Tensor index, Tensor weight, {_WEIGHTS}, "
                f"{ROUTING_SCHEMA}, {GATING_SCHEMA}, bool[] needs)"
                " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip


class Plan(NamedTuple):
    """The tiles of one call; every kernel that walks row tiles walks those of the same height."""

    up: tuning.Tile
    up_inference: tuning.Tile
    up_rows: tuning.Tile
    down: tuning.Tile
    gate_gradient: tuning.Tile
    x_gradient: tuning.Tile
    up_gradient: tuning.Tile
    down_gradient: tuning.Tile

    @classmethod
    @functools.lru_cache(maxsize=256)
    def of(cls, device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> "Plan":
        return cls(*(tuning.choose(op, device, dtype, rows_per_expert) for op in cls._fields))


def _by_sorted_rows(x, index, weight, up, down, up_bias, down_bias, gating, *, store_h):
    (T, K), E = index.shape, up.shape[0]
    plan = Plan.of(x.device, x.dtype, T * K // E)
    routing = route(index, E, plan.up.m)
    gather_tile = plan.up if store_h else plan.up_inference
    specialized = grouped_hopper.suits(x, up, gather_tile, gating=gating, bias=up_bias)
    spread_x = tuning.spreads(down.shape[2], store_h, specialized)
    x_rows = spread(x, routing, K) if spread_x else x
    h, a = up_projection(
        x_rows,
        up,
        routing,
        gating,
        plan.up_rows if spread_x else gather_tile,
        per_token=None if spread_x else K,
        bias_EH=up_bias,
        store_h=store_h,
    )
    assert a is not None
    del x_rows
    y = grouped_linear(a, down, routing, plan.down, bias_EO=down_bias)
    return combine(y, weight, routing, K), h, routing


def _experts(
    x, index, weight, up, down, up_bias, down_bias, act, alpha, limit, up_offset, gated, interleaved, recompute
):
    if index.shape[0] == 0:
        none = index.new_empty(0, dtype=torch.int32)
        return x.new_zeros(x.shape), x.new_empty(0), none, none.clone(), none.clone(), none.clone()
    gating = Gating(act, alpha, limit, up_offset, gated, interleaved)
    x, up, down = x.contiguous(), dense_side(up), dense_side(down)
    out, h, routing = _by_sorted_rows(x, index, weight, up, down, up_bias, down_bias, gating, store_h=not recompute)
    return out, x.new_empty(0) if h is None else h, *routing[:4]


def _experts_fake(
    x, index, weight, up, down, up_bias, down_bias, act, alpha, limit, up_offset, gated, interleaved, recompute
):
    (T, K), E = index.shape, up.shape[0]
    out = x.new_empty(x.shape)
    h = x.new_empty(0) if recompute else x.new_empty((T * K, up.shape[1]))
    # A symbolic T stands for a batch that is not empty.
    if isinstance(T, int) and T == 0:
        h, sizes = x.new_empty(0), (0, 0, 0, 0)
    else:
        sizes = (T * K, T * K, E + 1, 3 * tile_capacity(T * K, E) + 1)
    return out, h, *(index.new_empty(size, dtype=torch.int32) for size in sizes)


def _experts_inference(
    x, index, weight, up, down, up_bias, down_bias, act, alpha, limit, up_offset, gated, interleaved
):
    if index.shape[0] == 0:
        return x.new_zeros(x.shape)
    gating = Gating(act, alpha, limit, up_offset, gated, interleaved)
    x, up, down = x.contiguous(), dense_side(up), dense_side(down)
    if tuning.is_small_batch(index.shape[0], index.numel(), up.shape[0]):
        return small_batch.experts(x, index, weight, up, down, up_bias, down_bias, gating)
    return _by_sorted_rows(x, index, weight, up, down, up_bias, down_bias, gating, store_h=False)[0]


def _experts_backward(
    dout, x, h, index, weight, up, down, up_bias, down_bias, row, position, offset, tile,
    act, alpha, limit, up_offset, gated, interleaved, needs,
):  # fmt: skip
    gating = Gating(act, alpha, limit, up_offset, gated, interleaved)
    needs_x, needs_weight, needs_up, needs_down, needs_up_bias, needs_down_bias = needs
    x, up, down, dout = x.contiguous(), dense_side(up), dense_side(down), dout.contiguous()
    (T, K), E = index.shape, up.shape[0]
    if T == 0:
        return tuple(
            like.new_zeros(like.shape) if need else dout.new_empty(0)
            for like, need in zip((x, weight, up, down, up_bias, down_bias), needs, strict=True)
        )
    none = dout.new_empty(0)
    dx = dweight = dup = ddown = dup_bias = ddown_bias = none
    plan = Plan.of(x.device, x.dtype, T * K // E)
    routing = Routing(row, position, offset, tile, plan.up.m)
    if needs_down_bias:
        ddown_bias = bias_gradient(dout, routing, per_token=K, weight_TK=weight)
    if needs_x or needs_weight or needs_up or needs_down or needs_up_bias:
        if h.numel() == 0:
            h, _ = up_projection(
                x, up, routing, gating, plan.up, per_token=K, bias_EH=up_bias, store_h=True, store_a=False
            )
        # A portable weight gradient gains so much from copied rows (676 TFLOP/s against 417) that it always gets them.
        specialized = grouped_hopper.suits(dout, down.transpose(1, 2), plan.gate_gradient)
        specialized = specialized and weight_gradient_hopper.suits(dout, h, plan.down_gradient)
        spread_dout = tuning.spreads(down.shape[2], needs_down, specialized) or (needs_down and not specialized)
        dout_rows = spread(dout, routing, K) if spread_dout else dout
        per_token = None if spread_dout else K
        da = grouped_linear(dout_rows, down.transpose(1, 2), routing, plan.gate_gradient, per_token=per_token)
        dh, wa, dweight = gating_gradient(
            h, da, weight, routing, gating, index_TK=index, dout_TD=dout, bias_ED=down_bias, store_a=needs_down
        )
        del da, h
        if needs_down:
            ddown = weight_gradient_as(down, dout_rows, wa, routing, plan.down_gradient, left_per_token=per_token)
        del dout_rows, wa
        if needs_up_bias:
            dup_bias = bias_gradient(dh, routing)
        if needs_up:
            dup = weight_gradient_as(up, dh, spread(x, routing, K), routing, plan.up_gradient)
        if needs_x:
            dx = combine(grouped_linear(dh, up.transpose(1, 2), routing, plan.x_gradient), None, routing, K)
    return dx, dweight if needs_weight else none, dup, ddown, dup_bias, ddown_bias


def _experts_backward_fake(
    dout, x, h, index, weight, up, down, up_bias, down_bias, row, position, offset, tile,
    act, alpha, limit, up_offset, gated, interleaved, needs,
):  # fmt: skip
    # A weight's gradient lies in memory as the weight does, these two are contiguous.
    x, weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    return tuple(
        torch.empty_like(like) if need else dout.new_empty(0)
        for like, need in zip((x, weight, up, down, up_bias, down_bias), needs, strict=True)
    )


def _experts_setup(ctx, inputs, output):
    x, index, weight, up, down, up_bias, down_bias, *gating, _ = inputs
    _, h, *routing = output
    ctx.mark_non_differentiable(h, *routing)
    ctx.set_materialize_grads(False)
    ctx.gating = gating
    ctx.save_for_backward(x, h, index, weight, up, down, up_bias, down_bias, *routing)


def _experts_autograd(ctx, dout, *_):
    nothing = [None] * 7
    if dout is None:
        return (None,) * 14
    x, h, index, weight, up, down, up_bias, down_bias, *routing = ctx.saved_tensors
    at = (0, 2, 3, 4, 5, 6)
    needs = [ctx.needs_input_grad[i] for i in at]
    found = _run_experts_backward(dout, x, h, index, weight, up, down, up_bias, down_bias, *routing, *ctx.gating, needs)
    dx, dweight, dup, ddown, dup_bias, ddown_bias = (g if need else None for g, need in zip(found, needs, strict=True))
    return dx, None, dweight, dup, ddown, dup_bias, ddown_bias, *nothing


_run_experts = Operator("experts", _experts, _library)
_run_experts_inference = Operator("experts_inference", _experts_inference, _library)
_run_experts_backward = Operator("experts_backward", _experts_backward, _library)
torch.library.register_fake("hf_moe::experts", _experts_fake, lib=_library)
torch.library.register_fake("hf_moe::experts_inference", lambda x, *_: x.new_empty(x.shape), lib=_library)
torch.library.register_fake("hf_moe::experts_backward", _experts_backward_fake, lib=_library)
_run_experts.register_gradient(_experts_autograd, _experts_setup)


def experts(
    x_TD: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    *,
    gating: Gating = Gating(),  # noqa: B008 a NamedTuple is immutable
    recompute: bool = False,
) -> Tensor:
    """A mixture of expert MLPs, applied to each token's experts and summed with its routing weights.

        out[t] = Σ_k weight[t, k] · (down[e] @ gate(up[e] @ x[t] + up_bias[e]) + down_bias[e])      e = index[t, k]

    Args:
        x_TD: tokens; fp32, bf16 or fp16; copied unless contiguous. T may be 0.
        index_TK: int32 or int64. An id outside 0 .. E-1 is a route of no expert: it adds exactly zero.
        weight_TK: routing weights, any float dtype.
        up_EHD, down_EDF: x's dtype; views with swapped last dimensions are read in place.
        up_bias_EH, down_bias_ED: both or neither may be given, contiguous.
        gating: the function between the two projections, and the order of up's rows.
        recompute: keep only x for the backward, which then runs the first projection again.
    Returns:
        out_TD in x's dtype; every product is accumulated in fp32.
    Gradients: everything but index. A frozen tensor's is not computed. An expert without rows gets exactly zero.
    Kept for backward: x, h (N·H, unless recomputed), index, weight, and some 9·N bytes of row numbers.
    Cost: 2·N·D·(H + F) FLOPs forward, twice that backward; no host synchronisation, no atomics. A few tokens without
        gradients are not sorted, and cost their experts' bytes and two or three launches (`small_batch`).
    Source: dropless grouped computation, arXiv:2211.15841; gathers fused, arXiv:2403.08245; dw = ⟨downᵀ dout, a⟩ so
        that the rows of output need not be kept, arXiv:2512.14080.
    """
    differentiable = (x_TD, weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED)
    args = x_TD, index_TK, weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED, *gating
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        out, *_ = _run_experts(*args, recompute)
        return out
    return _run_experts_inference(*args)
