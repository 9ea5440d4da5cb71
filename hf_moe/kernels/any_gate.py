"""The expert layer around any gate: two grouped products as operators, and torch's own gradient between them.

    h[n] = up[e] @ x[n // K] + up_bias[e]        y[n] = down[e] @ gate(h[n]) + down_bias[e]

Letters: T tokens, K experts a token, N = T·K routed rows, D hidden, F expert width, H = 2F (gated) or F, E experts.
"""

import torch
from torch import Tensor

from . import tuning
from .combine import combine
from .descriptors import dense_side
from .grouped_linear import grouped_linear
from .operators import Operator
from .routing import ROUTING_SCHEMA, Routing, route, tile_capacity
from .weight_gradient import bias_gradient, weight_gradient_as

_library = torch.library.Library("hf_moe", "FRAGMENT")
_library.define("route(Tensor index, Tensor x, int n_experts) -> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"grouped_linear(Tensor x, Tensor weight, Tensor? bias, {ROUTING_SCHEMA}, int per_token)"
                " -> Tensor")  # fmt: skip
_library.define(f"grouped_linear_backward(Tensor dy, Tensor x, Tensor weight, {ROUTING_SCHEMA}, "
                "int per_token, bool[] needs) -> (Tensor, Tensor, Tensor)")  # fmt: skip


def _row_tile(x: Tensor, n_routes: int, n_experts: int) -> int:
    return tuning.choose("up", x.device, x.dtype, n_routes // n_experts).m


def _route(index, x, n_experts):
    return tuple(route(index, n_experts, _row_tile(x, index.numel(), n_experts))[:4])


def _route_fake(index, x, n_experts):
    N = index.numel()
    sizes = (N, N, n_experts + 1, 3 * tile_capacity(N, n_experts) + 1)
    return tuple(index.new_empty(size, dtype=torch.int32) for size in sizes)


def _grouped_linear(x, weight, bias, row, position, offset, tile, per_token):
    tile_rows = _row_tile(x, row.numel(), weight.shape[0])
    routing, weight = Routing(row, position, offset, tile, tile_rows), dense_side(weight)
    choice = tuning.choose("down", x.device, x.dtype, row.numel() // weight.shape[0])._replace(m=tile_rows)
    return grouped_linear(
        x.contiguous(), weight, routing, choice, bias_EO=bias, per_token=per_token or None, zero_unowned=True
    )


def _grouped_linear_backward(dy, x, weight, row, position, offset, tile, per_token, needs):
    tile_rows = _row_tile(x, row.numel(), weight.shape[0])
    routing, weight = Routing(row, position, offset, tile, tile_rows), dense_side(weight)
    dy, x, none = dy.contiguous(), x.contiguous(), dy.new_empty(0)
    dx = dweight = dbias = none
    rows = row.numel() // weight.shape[0]
    if needs[0]:
        choice = tuning.choose("x_gradient", x.device, x.dtype, rows)._replace(m=tile_rows)
        dx = grouped_linear(dy, weight.transpose(1, 2), routing, choice, zero_unowned=True)
        if per_token:
            dx = combine(dx, None, routing, per_token)
    if needs[1]:
        choice = tuning.choose("up_gradient", x.device, x.dtype, rows)
        dweight = weight_gradient_as(weight, dy, x, routing, choice, right_per_token=per_token or None)
    if needs[2]:
        dbias = bias_gradient(dy, routing)
    return dx, dweight, dbias


def _grouped_linear_setup(ctx, inputs, output):
    x, weight, _, *routing, ctx.per_token = inputs
    ctx.save_for_backward(x, weight, *routing)


def _grouped_linear_autograd(ctx, dy):
    x, weight, *routing = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = _run_grouped_linear_backward(dy, x, weight, *routing, ctx.per_token, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *([None] * 5)


_run_route = Operator("route", _route, _library)
_run_grouped_linear = Operator("grouped_linear", _grouped_linear, _library)
_run_grouped_linear_backward = Operator("grouped_linear_backward", _grouped_linear_backward, _library)
torch.library.register_fake("hf_moe::route", _route_fake, lib=_library)
torch.library.register_fake(
    "hf_moe::grouped_linear",
    lambda x, weight, bias, row, *_: x.new_empty((row.shape[0], weight.shape[1])),
    lib=_library,
)
torch.library.register_fake(
    "hf_moe::grouped_linear_backward",
    lambda dy, x, weight, row, position, offset, tile, per_token, needs: (
        x.new_empty(x.shape) if needs[0] else dy.new_empty(0),
        torch.empty_like(weight) if needs[1] else dy.new_empty(0),
        dy.new_empty(weight.shape[:2]) if needs[2] else dy.new_empty(0),
    ),
    lib=_library,
)
_run_grouped_linear.register_gradient(_grouped_linear_autograd, _grouped_linear_setup)


def experts_with_gate(x_TD, index_TK, weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED, *, gate) -> Tensor:
    """`experts` with any row-wise torch function for a gate: unfused, and autograd keeps what `gate` needs.

    Args:
        gate: (N, H) → (N, F), for instance a module's own `_apply_gate`. The rest is as for `experts`.
    """
    if index_TK.shape[0] == 0:
        # Each weight gets its zero gradient: processes that share it wait for one.
        given = (weight_TK, up_EHD, down_EDF, up_bias_EH, down_bias_ED)
        return x_TD + sum(tensor[:0].sum() for tensor in given if tensor is not None)
    T, K = index_TK.shape
    routing = _run_route(index_TK, x_TD, up_EHD.shape[0])
    h_NH = _run_grouped_linear(x_TD, up_EHD, up_bias_EH, *routing, K)
    y_ND = _run_grouped_linear(gate(h_NH), down_EDF, down_bias_ED, *routing, 0)
    position_N = routing[1]
    owned_TK1 = (position_N >= 0).view(T, K, 1)
    y_TKD = y_ND[position_N.clamp(min=0)].view(T, K, -1)
    return (y_TKD * weight_TK.unsqueeze(-1)).masked_fill(~owned_TK1, 0.0).sum(1).to(x_TD.dtype)
